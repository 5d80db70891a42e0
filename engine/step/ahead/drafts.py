"""A whole draft as one launch, and behind it the first half of the step that verifies it.

While the device drafts the host prepares that step, and launches its patcher and encoder over the drafts that only the
device knows.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from kernels.dispatch import Kernels

from ...decoders import Call, Result
from ..results import uniform
from ..runner import STAND_IN, Runner, Started, Work
from ..sampling import check, draw_ids, padded_laws, uniforms_for
from ..transfer import reading, sent


def draft(runner: Runner, kernels: Kernels, batch: Sequence[Work], calls: Sequence[Call]) -> list[Result]:
    """The results of calls with a causal cell each, after as many passes as all of them let follow."""
    passes = range(1 + min(call.ahead for call in calls))
    pairs = list(zip(batch, calls, strict=True))
    plans = [
        runner.plan_decoder([replace(w, call=replace(call, start=call.start + n)) for w, call in pairs]) for n in passes
    ]
    padding = plans[0].padded - len(batch)
    uniforms = [[uniform(w.sequence, call.start + 1 + n) for w, call in pairs] + [0.0] * padding for n in passes]
    params = [w.sequence.request.sampling for w in batch]
    tensors = padded_laws(params, plans[0].padded, runner.vocab_size, runner.device)
    tensors["ids"] = sent(np.array([call.causal[0] for call in calls] + [0] * padding), runner.device)
    if (draws := uniforms_for(tensors, uniforms, runner.device)) is not None:
        tensors["uniforms"] = draws
    launch, out = runner.decode_passes("draft", plans, 1, tensors, partial(_Drafting, kernels))
    for plan in plans:
        runner.charge(launch, plan.works)
    runner.finish(launch)
    drawn, highest = out[:, :, : len(batch)].unbind(1)
    drafts = drawn.T.long()
    heard = reading(drafts, highest.flatten())
    started = _verification(runner, batch, calls, drafts)
    after, best = heard()
    check(best)
    if started:
        started.ids = [[call.causal[0], *ids] for call, ids in zip(calls, after, strict=True)]
    return [Result(w.end, ids) for w, ids in zip(batch, after, strict=True)]


def _verification(runner: Runner, batch: Sequence[Work], calls: Sequence[Call], drafts: Tensor) -> Started | None:
    """Begins it, if all drafts (S, k) began with this launch and end with it, and there are pages."""
    size = drafts.shape[1]
    if any(call.drafts or call.start != w.end or call.ahead + 1 != size for w, call in zip(batch, calls, strict=True)):
        return None
    if not all(runner.try_reserve(w.sequence, w.end + 1 + size, w.end + 1 + size) for w in batch):
        return None
    windows = runner.windows((w.sequence, w.end) for w in batch)
    width = windows.shape[1]
    fed = torch.cat((windows, drafts), dim=1).unfold(1, width, 1).reshape(-1, width)
    for w in batch:
        w.sequence.extend([STAND_IN] * size)
    rows = [Work(w.sequence, w.end, w.end + 1 + size, None, w.end, w.counted_from) for w in batch]
    started = runner.start(rows, fed)
    for w in batch:
        w.sequence.retract(w.end + 1)
    return started


class _Drafting:
    """Passes each of which is fed with what was drawn from the one before; see `engine.step.runner.PassState`."""

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
