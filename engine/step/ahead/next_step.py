"""The next step of blt, begun before the host reads the results of this one.

Patcher and encoder of the next step need the byte that was just drawn, which is on the device. So the host launches
them right after the step. While the device runs them, the host reads the bytes, commits them, answers and plans. If the
next step then has other rows, because a sequence ended or a prompt arrived, they are discarded.
"""

import time
from collections.abc import Sequence

import torch

from kernels.dispatch import Kernels

from ...config import Policy
from ...costs.latency import NEXT_STEP
from ...costs.ledger import Ledger
from ...decoders import Next, Result
from ...memory.memory import Memory, Reach
from ...rows import Rows
from ..results import uniform
from ..sampling import check, draw_ids, padded_params, uniforms_for
from ..stages import STAND_IN, Stages
from ..transfer import read_async

PROBE_INTERVAL = 256
"""Steps after which one is begun although it did not seem worthwhile: only that shows how long it takes."""


class NextStepAhead:
    """Runs steps of blt alone, and begins the next."""

    def __init__(self, stages: Stages, memory: Memory, ledger: Ledger, kernels: Kernels) -> None:
        self._stages, self._memory, self._ledger, self._kernels = stages, memory, ledger, kernels
        self._idle = 0

    def run(self, batch: Sequence[Rows], policy: Policy) -> list[Result] | None:
        """The results of a step; None, with nothing done, if beginning the next would not pay."""
        if not self._worthwhile(batch, policy):
            return None
        stages, size, device = self._stages, len(batch), self._stages.launcher.device
        sampling = [rows.sequence.request.sampling for rows in batch]
        params = padded_params(sampling, size, stages.decoder.vocab_size, device)
        logits = stages.run(batch)
        uniforms = uniforms_for(params, [uniform(rows.sequence, rows.end) for rows in batch], device)
        ids, highest = draw_ids(logits, params, uniforms, self._kernels)
        readback = read_async(ids, highest)
        began, recorded = time.perf_counter(), stages.launcher.executor.num_recorded
        windows = stages.encoder.windows((rows.sequence, rows.end - 1) for rows in batch)
        for rows in batch:
            rows.sequence.extend((STAND_IN,))
        following = [
            Rows(rows.sequence, rows.end, rows.end + 1, decode_from=rows.end, counted_from=rows.counted_from)
            for rows in batch
        ]
        begun = stages.begin(following, torch.cat((windows[:, 1:], ids[:, None]), dim=1))
        for rows in batch:
            rows.sequence.retract(rows.end)
        if stages.launcher.executor.num_recorded == recorded:
            self._ledger.latency.observe(NEXT_STEP, size, time.perf_counter() - began)
        drawn, bests = readback()
        check(bests)
        begun.ids = [[token] for token in drawn]
        return [Result([token]) for token in drawn]

    def _worthwhile(self, batch: Sequence[Rows], policy: Policy) -> bool:
        """Whether the device's work takes longer than its launch by the host, all sequences continue, and there are
        pages."""
        if policy == "never" or not all(isinstance(rows.ask, Next) and rows.ask.at_most > 1 for rows in batch):
            return False
        wanted = policy == "always" or self._ledger.latency.next_step(len(batch)) < 1
        self._idle = 0 if wanted else self._idle + 1
        if self._idle > PROBE_INTERVAL and self._stages.launcher.device.type != "cpu":
            self._idle, wanted = 0, True
        return wanted and self._memory.reserve_all([Reach(rows.sequence, rows.end + 1, rows.end + 1) for rows in batch])
