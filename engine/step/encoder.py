"""The encoder stage: rows of the text, and drafts where the decoder reads the encoder -> byte states."""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq

import numpy as np
from torch import Tensor

from kernels.planning import Spans

from ..costs.ledger import Launch
from ..decoders import Draft
from ..memory.caches import Caches
from ..model import Model
from ..model.encoder import ngram_windows
from ..rows import Rows
from ..sequence import Sequence
from .launch import NOTHING, Launcher, padded_tensor
from .plan import padded_array
from .transfer import to_device


class EncoderStage:
    """takes_cells: whether the decoder reads the encoder's states, so that cells go through the encoder too."""

    def __init__(self, model: Model, caches: Caches, launcher: Launcher) -> None:
        self._model, self._caches, self._launcher = model, caches, launcher
        self._width = max(model.config.hashes.group_sizes)
        self.takes_cells = model.config.decoder_input == "encoder"

    def launch(self, batch: Seq[Rows], windows: Tensor | None = None) -> tuple[Launch, Tensor] | None:
        """Also returns the states; None if the batch has no rows for it. windows (rows, W): the last ids up to each
        row, if only the device knows them; padded."""
        encoded = [rows for rows in batch if rows.num_text or (self.takes_cells and rows.cells)]
        if not encoded:
            return None
        launch, spans, writes = self._launcher.begin("encoder"), Spans(), Spans()
        ids: list[int] = []
        for rows in encoded:
            start, end = (rows.start, rows.end) if rows.num_text else (rows.cells_start, rows.cells_start + 1)
            ids += self._windows_of(rows, start, end)
            launch.shares.append(self._launcher.share(spans, "encoder", rows, start, end))
            opened = rows.sequence.tables["open"]
            writes.add(opened.pages, opened.first, start, end - start, 0)
        launch.num_rows = spans.num_rows
        padded = self._launcher.executor.rows(spans.num_rows)
        plan = self._launcher.plan("encoder", spans, spans, padded)
        written = self._launcher.plan("open", writes, Spans(), 0)

        def stage(t: Mapping[str, Tensor]) -> Tensor:
            return self._model.encoder(
                t["windows"],
                self._caches.encoder,
                plan.on_device(t, "plan"),
                self._caches.open_states,
                self._caches.open_kv,
                written.on_device(t, "open"),
            )

        arrays = {"plan": plan.data, "open": written.data}
        if windows is None:
            arrays["windows"] = padded_array(ids, padded * self._width).reshape(padded, -1)
        given = NOTHING if windows is None else {"windows": windows}
        return launch, self._launcher.run(launch, stage, padded, arrays, plan, tensors=given)

    def _windows_of(self, rows: Rows, start: int, end: int) -> list[int]:
        ids = rows.sequence.ids
        if not isinstance(rows.ask, Draft):
            return ngram_windows(ids, start, end, self._width)
        # A draft's row comes after drafts that are not in the text.
        before = max(start - self._width, 0)
        text = [*ids[before:], *rows.ask.known[max(before - len(ids), 0) :]]
        return ngram_windows(text, start - before, end - before, self._width)

    def launch_ahead(self, batch: Seq[Rows], windows: Tensor) -> tuple[Launch, Tensor]:
        """Runs a row for each sequence, with bytes that only the device knows. windows (S, W): the last ids up to
        each."""
        launched = self.launch(batch, padded_tensor(windows, self._launcher.executor.rows(len(windows))))
        assert launched
        return launched

    def windows(self, rows: Iterable[tuple[Sequence, int]]) -> Tensor:
        """The last ids up to a byte of each sequence, (S, W) int64."""
        ids = [i for sequence, row in rows for i in ngram_windows(sequence.ids, row, row + 1, self._width)]
        return to_device(np.array(ids, dtype=np.int64), self._launcher.device).view(-1, self._width)
