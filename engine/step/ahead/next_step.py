"""The next step of blt, begun before the host hears what this one gave.

Patcher and encoder of the next step need the byte that was just drawn, and that is on the device. So the host launches
them behind the step; while the device runs them it reads the bytes, commits them, tells of them and plans. A step that
is then another one, because a sequence ended or a prompt came, leaves them for nothing.
"""

import time
from collections.abc import Sequence

import torch

from kernels.dispatch import Kernels

from ...decoders import Call, Result
from ..results import uniform
from ..runner import STAND_IN, Runner, Work
from ..sampling import check, draw_ids, padded_laws, uniforms_for
from ..transfer import reading

PROBE_INTERVAL = 256
"""Steps after which one is begun though it did not seem worth it: what that takes is only learnt from doing it."""


class Starting:
    """Runs steps of blt alone, and begins the next."""

    def __init__(self, runner: Runner, kernels: Kernels) -> None:
        self._runner, self._kernels = runner, kernels
        self._idle = 0

    def run(self, batch: Sequence[Work], calls: Sequence[Call]) -> list[Result] | None:
        """The results of a step; None, with nothing done, if there is no gain in beginning the next."""
        if not self._worthwhile(batch, calls):
            return None
        runner, size = self._runner, len(batch)
        laws = padded_laws([w.sequence.request.sampling for w in batch], size, runner.vocab_size, runner.device)
        logits = runner.run(batch)
        uniforms = uniforms_for(laws, [uniform(w.sequence, w.end) for w in batch], runner.device)
        ids, highest = draw_ids(logits, laws, uniforms, self._kernels)
        heard = reading(ids, highest)
        began, recorded = time.perf_counter(), runner.executor.num_recorded
        windows = runner.windows((w.sequence, w.end - 1) for w in batch)
        for w in batch:
            w.sequence.extend((STAND_IN,))
        rows = [Work(w.sequence, w.end, w.end + 1, None, w.end, w.counted_from) for w in batch]
        started = runner.start(rows, torch.cat((windows[:, 1:], ids[:, None]), dim=1))
        for w in batch:
            w.sequence.retract(w.end)
        if runner.executor.num_recorded == recorded:
            runner.costs.saw("starting", size, time.perf_counter() - began)
        after, bests = heard()
        check(bests)
        started.ids = [[token] for token in after]
        return [Result(w.end - 1, [token]) for w, token in zip(batch, after, strict=True)]

    def _worthwhile(self, batch: Sequence[Work], calls: Sequence[Call]) -> bool:
        """Whether the device has more to do than it takes the host to begin it, all sequences go on, and there are
        pages."""
        runner = self._runner
        policy = runner.ahead.next_step
        if policy == "never" or not all(call.ahead for call in calls):
            return False
        wanted = policy == "always" or runner.costs.starting(len(batch)) < 1
        self._idle = 0 if wanted else self._idle + 1
        if self._idle > PROBE_INTERVAL and runner.device.type != "cpu":
            self._idle, wanted = 0, True
        return wanted and all(runner.try_reserve(w.sequence, w.end + 1, w.end + 1) for w in batch)
