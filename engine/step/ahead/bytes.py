"""Bytes behind a step of blt, without the host between them.

Until a patch closes, blt needs the local stages alone for its next byte, and what these are fed is on the device: the
byte that was just drawn. So behind a step for sequences that all run blt the host launches some passes of patcher,
encoder and decoder before it has heard what the step gave. One whose patch closes takes part in vain from there on and
waits for the next step, where the others' patches close too: the global stage is read less often.
"""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kernels.dispatch import Kernels

from ...config import EOS_ID
from ...decoders import Call, Result
from ..results import uniform
from ..runner import STAND_IN, Runner, Unpaid, Work
from ..sampling import check, draw_ids, on_device, padded_laws, uniforms_for
from ..transfer import read

MOST_PASSES = 8
PROBE_INTERVAL = 256
"""Steps after which a pass is tried where none seemed worth it: what they take is only learnt from them."""
STAGES = 3


class Feeding:
    """Runs steps of blt alone, and what can follow each at once."""

    def __init__(self, runner: Runner, kernels: Kernels) -> None:
        self._runner, self._kernels = runner, kernels
        self._idle = 0

    def run(self, batch: Sequence[Work], calls: Sequence[Call]) -> list[Result] | None:
        """A step and what follows; None, with nothing done, if that promises no gain."""
        passes = self._worthwhile(batch, calls)
        if not passes:
            return None
        runner = self._runner
        sampling = [w.sequence.request.sampling for w in batch]
        laws = padded_laws(sampling, len(batch), runner.vocab_size, runner.device)
        logits = runner.run(batch)
        began, recorded = time.perf_counter(), runner.executor.num_recorded
        drawn, told, unpaid = self._launch(batch, logits, laws, passes)
        if runner.executor.num_recorded == recorded:
            runner.costs.saw("behind", len(batch), (time.perf_counter() - began) / len(told))
        # The host's stand-ins go; what they stood for comes.
        for w in batch:
            w.sequence.retract(w.end)
            w.sequence.patching.cut(w.end)
        (ids, highest), decided = torch.stack(drawn, 2), torch.stack(told, 2)
        after, bests, entropies, opens = read(ids.long(), highest.flatten(), *decided)
        check(bests)
        counts = [_count(ids, starts, call.ahead) for ids, starts, call in zip(after, opens, calls, strict=True)]
        for number, (call, works) in enumerate(unpaid):
            # What was done in vain is nobody's.
            served = [rows for rows, count in zip(works, counts, strict=True) if count > number // STAGES]
            if served:
                runner.charge(call, served)
            runner.finish(call)
        for w, count, values in zip(batch, counts, entropies, strict=True):
            w.sequence.patching.take(values[:count], [False] * count)
        return [Result(w.end - 1, ids[: n + 1]) for w, n, ids in zip(batch, counts, after, strict=True)]

    def _worthwhile(self, batch: Sequence[Work], calls: Sequence[Call]) -> int:
        """How many passes promise to feed more bytes than further steps would in their time, if there are pages."""
        runner, size, most = self._runner, len(batch), min(max(call.ahead for call in calls), MOST_PASSES)
        if not most or runner.ahead.bytes == "never":
            return 0
        if size == 1 and runner.ahead.bytes == "measured" and runner.device.type == "cpu":
            # There the host computes: all that passes could save is the global stage's weights, read for several.
            return 0
        # Behind a BOS alone there are more starts than bytes.
        patches = [max(w.sequence.mean_patch, 1.0) for w in batch]
        needed = 0.0
        if runner.ahead.bytes == "measured":
            needed = size * runner.costs.feeding(size, size / sum(1 / patch for patch in patches))
        passes = 0
        while passes < most:
            lasts = [1 - 1 / patch for patch, call in zip(patches, calls, strict=True) if call.ahead > passes]
            if sum(chance ** (passes + 1) for chance in lasts) < needed:
                break
            passes += 1
        self._idle = 0 if passes else self._idle + 1
        if self._idle > PROBE_INTERVAL:
            self._idle, passes = 0, 1
        # They close no patch.
        return passes if all(runner.try_reserve(w.sequence, w.end, w.end + passes) for w in batch) else 0

    def _launch(
        self, batch: Sequence[Work], logits: Tensor, laws: Mapping[str, Tensor], passes: int
    ) -> tuple[list[Tensor], list[Tensor], Unpaid]:
        """What was drawn and its largest logits, (2, S) float64 for the step and each pass; what the patcher said of
        each, (2, S) float32; the launches. logits (S, V): the step's. laws: see `engine.step.sampling.draw_ids`."""
        runner = self._runner
        windows = runner.windows((w.sequence, w.end - 1) for w in batch)
        entropies = on_device([w.sequence.patching.last_entropy for w in batch], runner.device)
        drawn: list[Tensor] = []
        told: list[Tensor] = []
        unpaid: Unpaid = []
        while True:
            number = len(drawn)
            uniforms = uniforms_for(laws, [uniform(w.sequence, w.end + number) for w in batch], runner.device)
            ids, highest = draw_ids(logits, laws, uniforms, self._kernels)
            drawn.append(torch.stack((ids.double(), highest.double())))
            if number == passes:
                break
            windows = torch.cat((windows[:, 1:], ids[:, None]), dim=1)
            rows = [self._row(w, number) for w in batch]
            # The next pass writes its own over it.
            told.append(runner.feed(rows, windows, entropies, unpaid).clone())
            entropies = told[-1][0]
            if runner.device.type == "cpu" and told[-1][1].all():
                # Here it costs nothing to look.
                break
            for w in batch:
                w.sequence.patching.take([0.0], [False])
            logits = runner.decode_fed(rows, windows, unpaid)
        return drawn, told, unpaid

    def _row(self, w: Work, number: int) -> Work:
        """That of the byte behind the step and so many passes."""
        w.sequence.extend((STAND_IN,))
        row = w.end + number
        return Work(w.sequence, row, row + 1, w.call, row, w.counted_from)


def _count(ids: Sequence[int], starts: Sequence[float], most: int) -> int:
    """Of how many passes the bytes stand: none starts a patch or a document. ids: what was drawn in the step and in the
    passes. starts: per pass, whether a patch starts behind the byte that it was fed."""
    count = 0
    while count < min(most, len(starts)) and ids[count] != EOS_ID and not starts[count]:
        count += 1
    return count
