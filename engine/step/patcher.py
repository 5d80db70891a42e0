"""The patcher stage: rows of the text -> entropies -> which bytes start a patch."""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.planning import Spans

from ..costs.ledger import Launch
from ..memory.caches import Caches
from ..model import Model
from ..patching import boundary_rule
from ..rows import Rows
from .launch import NOTHING, Launcher, padded_tensor
from .plan import padded_array
from .transfer import Readback

Decide = Callable[[], None]
"""Waits for decisions and passes them to their sequences."""


class PatcherStage:
    def __init__(self, model: Model, caches: Caches, launcher: Launcher) -> None:
        self._model, self._caches, self._launcher = model, caches, launcher
        self._rule = boundary_rule(model.config.patching)

    def launch(self, batch: Seq[Rows], ids: Tensor | None = None) -> tuple[Launch, Decide]:
        """Runs the batch's rows of the text. ids (rows,): theirs, if only the device knows them; padded."""
        launch, decisions = self._launch(batch, NOTHING if ids is None else {"ids": ids})
        readback = Readback(decisions)

        def decide() -> None:
            entropies, opens = readback.wait().tolist()
            row = 0
            for rows in batch:
                count = rows.num_text
                known = min(max(rows.sequence.patching.decided - rows.start, 0), count)
                rows.sequence.decide(entropies[row + known : row + count], opens[row + known : row + count])
                row += count

        return launch, decide

    def launch_ahead(self, batch: Seq[Rows], ids: Tensor, entropies: Tensor) -> tuple[Launch, Tensor]:
        """Runs a row for each sequence, with bytes that only the device knows: the entropies after them, and whether
        the next bytes start patches, (2, S) float32.

        ids (S,): the bytes; the host holds stand-ins for them. entropies (S,): after the bytes before.
        """
        executor = self._launcher.executor
        padded = executor.rows(len(batch))
        previous = padded_tensor(entropies.double(), executor.parts(len(batch), padded)).view(torch.int64)
        given = {"ids": padded_tensor(ids, padded), "previous": previous}
        launch, decisions = self._launch(batch, given)
        return launch, decisions[:, : len(batch)]

    def _launch(self, batch: Seq[Rows], given: Mapping[str, Tensor]) -> tuple[Launch, Tensor]:
        """Also returns the rows' entropies and decisions, as `kernels.boundary` gives them. given: "ids" (rows,) and
        "previous", if these are on the device."""
        launch, spans = self._launcher.begin("patcher"), Spans()
        launch.shares = [self._launcher.share(spans, "patcher", rows, rows.start, rows.end) for rows in batch]
        launch.num_rows = spans.num_rows
        padded = self._launcher.executor.rows(spans.num_rows)
        plan = self._launcher.plan("patcher", spans, spans, padded)
        undecided, previous = self._undecided(batch, padded)

        def stage(t: Mapping[str, Tensor]) -> Tensor:
            entropies = self._model.patcher(t["ids"], self._caches.patcher, plan.on_device(t, "plan"))
            previous = t["previous"].view(torch.float64)
            return self._model.kernels.boundaries(entropies, previous, t["undecided"], self._rule)

        arrays = {"undecided": undecided, "plan": plan.data}
        if "ids" not in given:
            ids = [token for rows in batch for token in rows.sequence.ids[rows.start : rows.end]]
            arrays["ids"] = padded_array(ids, padded)
        if "previous" not in given:
            arrays["previous"] = previous
        return launch, self._launcher.run(launch, stage, padded, arrays, plan, tensors=given)

    def _undecided(self, batch: Seq[Rows], padded: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The rows after which a patch may start, as `kernels.boundary` takes them, and the entropies before them, as
        the bits of float64: all arrays of a stage are int64. The boundary after a recomputed byte is frozen."""
        length = self._launcher.executor.parts(len(batch), padded)
        spans: list[int] = []
        previous: list[float] = []
        row = 0
        for rows in batch:
            patching, count = rows.sequence.patching, rows.num_text
            known = min(max(patching.decided - rows.start, 0), count)
            spans += (row + known, count - known, patching.decided, patching.starts[-1])
            previous.append(patching.last_entropy)
            row += count
        padding = length - len(batch)
        return padded_array(spans, 4 * length).reshape(length, 4), np.array(previous + [0.0] * padding).view(np.int64)
