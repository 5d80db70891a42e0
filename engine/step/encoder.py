"""The encoder stage: rows of the text, and drafts where the decoder reads the encoder -> byte states."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq

from torch import Tensor

from kernels.planning import Spans

from ..costs.ledger import Launch
from ..memory.caches import Caches
from ..memory.text import Slots
from ..model import Model
from ..rows import Rows
from .launch import Launcher
from .plan import padded_array


class EncoderStage:
    """takes_cells: whether the decoder reads the encoder's states, so that cells go through the encoder too. reach: how
    many ids before a row's its n-grams hold."""

    def __init__(self, model: Model, caches: Caches, slots: Slots, launcher: Launcher) -> None:
        self._model, self._caches, self._text_slots, self._launcher = model, caches, slots, launcher
        self.reach = max(model.config.hashes.group_sizes, default=1) - 1
        self.takes_cells = model.config.decoder_input == "encoder"

    def launch(self, batch: Seq[Rows]) -> tuple[Launch, Tensor] | None:
        """Also returns the states; None if the batch has no rows for it."""
        encoded = [rows for rows in batch if rows.num_text or (self.takes_cells and rows.num_cells)]
        if not encoded:
            return None
        launch, spans, writes = self._launcher.begin("encoder"), Spans(), Spans()
        places: list[int] = []
        for rows in encoded:
            start, end = (rows.start, rows.end) if rows.num_text else (rows.cells_start, rows.cells_start + 1)
            at = self._text_slots.place(rows.sequence, start)
            places += range(at, at + end - start)
            launch.shares.append(self._launcher.share(spans, "encoder", rows, start, end))
            opened = rows.sequence.tables["open"]
            writes.add(opened.pages, opened.first, start, end - start, 0)
        launch.num_rows = spans.num_rows
        padded = self._launcher.executor.rows(spans.num_rows)
        plan = self._launcher.plan("encoder", spans, spans, padded)
        written = self._launcher.plan("open", writes, Spans(), 0)
        ids = self._text_slots.text.ids

        def stage(t: Mapping[str, Tensor]) -> Tensor:
            return self._model.encoder(
                ids,
                t["at"],
                self._caches.encoder,
                plan.on_device(t, "plan"),
                self._caches.open_states,
                self._caches.open_kv,
                written.on_device(t, "open"),
            )

        arrays = {"at": padded_array(places, padded), "plan": plan.data, "open": written.data}
        return launch, self._launcher.run(launch, stage, padded, arrays, plan)
