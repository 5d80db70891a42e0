"""Bytes ahead: runs blt several bytes ahead of the host.

Until a patch closes, blt needs only the local stages for its next byte, and their input is on the device: the byte that
was just drawn. So after a step whose sequences all run blt, the host launches some passes of patcher, encoder and
decoder before it reads the step's results. Once a sequence's patch closes, its further passes are wasted. It waits for
the next step, in which other patches close too, so that the global stage is read less often.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.dispatch import Kernels

from ...config import EOS_ID, Policy
from ...costs.latency import BYTE_AHEAD
from ...costs.ledger import Launch, Ledger, Share
from ...decoders import Next, Result
from ...memory.memory import Memory, Reach
from ...rows import Rows
from ..results import uniform
from ..sampling import check, draw_ids, on_device, padded_params, uniforms_for
from ..stages import STAND_IN, Stages
from ..transfer import read

MOST_PASSES = 8
PROBE_INTERVAL = 256
"""Steps after which a pass is tried although none seemed worthwhile: only a pass shows how long it takes."""


@dataclass(slots=True)
class _Passes:
    """What a step and its passes gave. drawn: per step and pass the bytes and their largest logits, (2, S) float64;
    decided: per pass the entropies after the bytes that it was fed, and whether patches start there, (2, S) float32;
    launches: per pass, and whose rows each has."""

    drawn: list[Tensor] = field(default_factory=list)
    decided: list[Tensor] = field(default_factory=list)
    launches: list[list[tuple[Launch, list[Share]]]] = field(default_factory=list)


class BytesAhead:
    """Runs steps of blt alone, and the passes that can follow each at once."""

    def __init__(self, stages: Stages, memory: Memory, ledger: Ledger, kernels: Kernels) -> None:
        self._stages, self._memory, self._ledger, self._kernels = stages, memory, ledger, kernels
        self._device = stages.launcher.device
        self._idle = 0

    def run(self, batch: Sequence[Rows], policy: Policy) -> list[Result] | None:
        """The results of a step and of passes after it; None, with nothing done, if these promise no gain."""
        at_most = [rows.ask.at_most for rows in batch if isinstance(rows.ask, Next)]
        passes = self._worthwhile(batch, at_most, policy)
        if not passes:
            return None
        sampling = [rows.sequence.request.sampling for rows in batch]
        params = padded_params(sampling, len(batch), self._stages.decoder.vocab_size, self._device)
        logits = self._stages.run(batch)
        executor = self._stages.launcher.executor
        began, recorded = time.perf_counter(), executor.num_recorded
        found = self._launch(batch, logits, params, passes)
        if executor.num_recorded == recorded:
            seconds = (time.perf_counter() - began) / len(found.decided)
            self._ledger.latency.observe(BYTE_AHEAD, len(batch), seconds)
        # Replaces the host's stand-ins by the real ids and decisions.
        for rows in batch:
            rows.sequence.retract(rows.end)
            rows.sequence.undecide(rows.end)
        (drawn, highest), decided = torch.stack(found.drawn, 2), torch.stack(found.decided, 2)
        ids, bests, entropies, opens = read(drawn.long(), highest.flatten(), *decided)
        check(bests)
        counts = [_count(own, starts, most - 1) for own, starts, most in zip(ids, opens, at_most, strict=True)]
        for number, launches in enumerate(found.launches):
            for launch, shares in launches:
                # Wasted passes are charged to no request.
                served = [share for share, count in zip(shares, counts, strict=True) if count > number]
                self._ledger.took(launch, *([served] if served else []))
        for rows, count, values in zip(batch, counts, entropies, strict=True):
            rows.sequence.decide(values[:count], [False] * count)
        return [Result(drawn[: count + 1]) for drawn, count in zip(ids, counts, strict=True)]

    def _worthwhile(self, batch: Sequence[Rows], at_most: Sequence[int], policy: Policy) -> int:
        """How many passes are expected to feed more bytes than steps would in the same time, if there are pages."""
        size, most = len(batch), min(max(at_most) - 1, MOST_PASSES)
        if not most or policy == "never":
            return 0
        if size == 1 and policy == "measured" and self._device.type == "cpu":
            # On a CPU passes only save reads of the global stage's weights, and only for several sequences.
            return 0
        # After a BOS alone there are more starts than bytes.
        patches = [max(rows.sequence.mean_patch, 1.0) for rows in batch]
        needed = 0.0
        if policy == "measured":
            needed = size * self._ledger.latency.byte_ahead(size, size / sum(1 / patch for patch in patches))
        passes = 0
        while passes < most:
            lasts = [1 - 1 / patch for patch, own in zip(patches, at_most, strict=True) if own - 1 > passes]
            if sum(chance ** (passes + 1) for chance in lasts) < needed:
                break
            passes += 1
        self._idle = 0 if passes else self._idle + 1
        if self._idle > PROBE_INTERVAL:
            self._idle, passes = 0, 1
        # They close no patch.
        reaches = [Reach(rows.sequence, rows.end, rows.end + passes) for rows in batch]
        return passes if self._memory.reserve_all(reaches) else 0

    def _launch(self, batch: Sequence[Rows], logits: Tensor, params: Mapping[str, Tensor], passes: int) -> _Passes:
        """Draws the step's bytes and launches the passes. logits (S, V): the step's. params: see
        `engine.step.sampling.draw_ids`."""
        stages = self._stages
        windows = stages.encoder.windows((rows.sequence, rows.end - 1) for rows in batch)
        entropies = on_device([rows.sequence.patching.last_entropy for rows in batch], self._device)
        found = _Passes()
        while True:
            number = len(found.drawn)
            uniforms = uniforms_for(params, [uniform(rows.sequence, rows.end + number) for rows in batch], self._device)
            ids, highest = draw_ids(logits, params, uniforms, self._kernels)
            found.drawn.append(torch.stack((ids.double(), highest.double())))
            if number == passes:
                return found
            windows = torch.cat((windows[:, 1:], ids[:, None]), dim=1)
            for rows in batch:
                rows.sequence.extend((STAND_IN,))
            fed = [_row(rows, rows.end + number) for rows in batch]
            patched, decided = stages.patcher.launch_ahead(fed, ids, entropies)
            found.launches.append([(patched, patched.shares)])
            # The next pass overwrites the original.
            found.decided.append(decided.clone())
            entropies = found.decided[-1][0]
            if self._device.type == "cpu" and found.decided[-1][1].all():
                # On a CPU this check is free.
                return found
            for rows in batch:
                rows.sequence.decide([0.0], [False])
            encoded, states = stages.encoder.launch_ahead(fed, windows)
            decoded, logits = stages.decoder.launch(stages.plan_decoder(fed), ids=ids, states=states)
            found.launches[-1] += [(encoded, encoded.shares), (decoded, decoded.shares)]


def _row(rows: Rows, at: int) -> Rows:
    """A row for a byte that only the device knows."""
    sequence = rows.sequence
    return Rows(sequence, at, at + 1, rows.ask, logits_from=at, decode_from=at, counted_from=rows.counted_from)


def _count(ids: Sequence[int], starts: Sequence[float], most: int) -> int:
    """How many passes are valid: those before a patch or a document starts. ids: drawn in the step and in the passes.
    starts: per pass, whether a patch starts after the byte that it was fed."""
    count = 0
    while count < min(most, len(starts)) and ids[count] != EOS_ID and not starts[count]:
        count += 1
    return count
