"""Drafts ahead: a whole draft as one launch, followed by the first half of the step that verifies it.

While the device drafts, the host prepares that step. It launches the patcher and encoder over the drafts, which only
the device knows.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from kernels.dispatch import Kernels

from ...config import Policy
from ...costs.ledger import Ledger
from ...decoders import Draft, Result
from ...memory.memory import Memory, Reach
from ...rows import Rows
from ..results import uniform
from ..sampling import check, draw_ids, padded_params, uniforms_for
from ..stages import STAND_IN, Begun, Stages
from ..transfer import read_async, to_device


class DraftsAhead:
    """Runs steps of drafts alone."""

    def __init__(self, stages: Stages, memory: Memory, ledger: Ledger, kernels: Kernels) -> None:
        self._stages, self._memory, self._ledger, self._kernels = stages, memory, ledger, kernels

    def run(self, batch: Sequence[Rows], policy: Policy) -> list[Result] | None:
        """The results after as many passes as all drafts allow; None, with nothing done, if that is only one."""
        asks = [rows.ask for rows in batch if isinstance(rows.ask, Draft)]
        most = min(ask.at_most for ask in asks)
        if most == 1 or policy == "never":
            return None
        stages, device = self._stages, self._stages.launcher.device
        plans = [
            stages.plan_decoder([replace(rows, cells_start=rows.cells_start + n) for rows in batch])
            for n in range(most)
        ]
        padded = plans[0].padded
        padding = padded - len(batch)
        sampling = [rows.sequence.request.sampling for rows in batch]
        tensors = padded_params(sampling, padded, stages.decoder.vocab_size, device)
        tensors["ids"] = to_device(np.array([rows.cells[0] for rows in batch] + [0] * padding), device)
        uniforms = [
            [uniform(rows.sequence, rows.cells_start + 1 + n) for rows in batch] + [0.0] * padding for n in range(most)
        ]
        if (draws := uniforms_for(tensors, uniforms, device)) is not None:
            tensors["uniforms"] = draws
        launch, out = stages.decoder.launch_passes("draft", plans, 1, tensors, partial(_Drafting, self._kernels))
        self._ledger.took(launch, *(plan.shares for plan in plans))
        drawn, highest = out[:, :, : len(batch)].unbind(1)
        drafts = drawn.T.long()
        readback = read_async(drafts, highest.flatten())
        begun = self._begin_verification(batch, asks, drafts)
        ids, bests = readback()
        check(bests)
        if begun:
            begun.ids = [[rows.cells[0], *own] for rows, own in zip(batch, ids, strict=True)]
        return [Result(own) for own in ids]

    def _begin_verification(self, batch: Sequence[Rows], asks: Sequence[Draft], drafts: Tensor) -> Begun | None:
        """Begins the verification if this launch made all of the drafts (S, k), and if there are pages."""
        size, stages = drafts.shape[1], self._stages
        if any(ask.known or ask.at_most != size for ask in asks):
            return None
        if not self._memory.reserve_all(
            [Reach(rows.sequence, rows.end + 1 + size, rows.end + 1 + size) for rows in batch]
        ):
            return None
        windows = stages.encoder.windows((rows.sequence, rows.end) for rows in batch)
        width = windows.shape[1]
        fed = torch.cat((windows, drafts), dim=1).unfold(1, width, 1).reshape(-1, width)
        for rows in batch:
            rows.sequence.extend([STAND_IN] * size)
        verified = [
            Rows(rows.sequence, rows.end, rows.end + 1 + size, decode_from=rows.end, counted_from=rows.counted_from)
            for rows in batch
        ]
        begun = stages.begin(verified, fed)
        for rows in batch:
            rows.sequence.retract(rows.end + 1)
        return begun


class _Drafting:
    """Passes that are each fed the ids drawn from the one before; see `engine.step.decoder.PassState`."""

    def __init__(self, kernels: Kernels, tensors: Mapping[str, Tensor]) -> None:
        self._kernels, self._tensors = kernels, tensors
        self.cells = tensors["ids"]
        self._drawn: list[Tensor] = []

    def take(self, logits: Tensor) -> None:
        uniforms = self._tensors.get("uniforms")
        own = None if uniforms is None else uniforms[len(self._drawn)]
        self.cells, highest = draw_ids(logits, self._tensors, own, self._kernels)
        self._drawn.append(torch.stack((self.cells.double(), highest.double())))

    def out(self) -> Tensor:
        """(passes, 2, R) float64: the ids that were drawn, and the largest logits."""
        return torch.stack(self._drawn)
