"""The patcher stage: rows of the text -> entropies -> which bytes start a patch."""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq

from torch import Tensor

from kernels.embedding import Ids
from kernels.planning import Spans

from ..costs.ledger import Launch
from ..memory.caches import Caches
from ..memory.text import Slots
from ..model import Model
from ..patching import boundary_rule
from ..rows import Rows
from ..transfer import Readback
from .launch import Launcher
from .plan import padded_array

Decide = Callable[[], None]
"""Waits for decisions and passes them to their sequences."""


class PatcherStage:
    def __init__(self, model: Model, caches: Caches, slots: Slots, launcher: Launcher) -> None:
        self._model, self._caches, self._text_slots, self._launcher = model, caches, slots, launcher
        self._rule = boundary_rule(model.config.patching)

    def launch(self, batch: Seq[Rows]) -> tuple[Launch, Tensor]:
        """Runs the batch's rows of the text, and writes into it where patches start; also returns the rows' entropies
        and decisions, as `kernels.boundary` gives them."""
        launch, spans = self._launcher.begin("patcher"), Spans()
        launch.shares = [self._launcher.share(spans, "patcher", rows, rows.start, rows.end) for rows in batch]
        launch.num_rows = spans.num_rows
        executor = self._launcher.executor
        padded = executor.rows(spans.num_rows)
        plan = self._launcher.plan("patcher", spans, spans, padded)
        text = self._text_slots.text

        def stage(t: Mapping[str, Tensor]) -> Tensor:
            entropies = self._model.patcher(Ids(text.ids, t["at"]), self._caches.patcher, plan.on_device(t, "plan"))
            return self._model.kernels.boundaries(entropies, text, t["undecided"], self._rule)

        undecided = padded_array(self._undecided(batch), 4 * executor.parts(len(batch), padded)).reshape(-1, 4)
        arrays = {"at": padded_array(self._text_slots.places(batch), padded), "undecided": undecided, "plan": plan.data}
        return launch, self._launcher.run(launch, stage, padded, arrays, plan)

    def read(self, batch: Seq[Rows], decisions: Tensor) -> Decide:
        """Begins to read what `launch` found."""
        readback = Readback(decisions)

        def decide() -> None:
            entropies, opens = readback.wait().tolist()
            row = 0
            for rows in batch:
                first, row = row + rows.num_decided, row + rows.num_text
                rows.sequence.decide(entropies[first:row], opens[first:row])

        return decide

    def _undecided(self, batch: Seq[Rows]) -> list[int]:
        """The rows after which a patch may start, as `kernels.boundary` takes them. The boundary after a recomputed
        byte is frozen."""
        spans: list[int] = []
        row = 0
        for rows in batch:
            known = rows.num_decided
            first = rows.start + known
            spans += (row + known, rows.num_text - known, self._text_slots.place(rows.sequence, first), first)
            row += rows.num_text
        return spans
