"""Passes over blocks: as many in one launch as they will probably need.

Only the device knows whether a block is done. To ask takes time in which it does nothing, and a pass too many takes its
own; so one more pass is launched unasked as long as that costs less, given how many blocks have needed it lately.
"""

import time
from collections import deque
from collections.abc import Sequence
from functools import partial

import torch
from msgspec.structs import replace
from torch import Tensor

from kernels.dispatch import Kernels

from ...decoders import Call, Result
from ...types import Unmask
from ..blocks import BlockPasses, block_tensors
from ..results import cell_params, uniform
from ..runner import DecoderRows, Runner, StageCall, Work, padded_tensor
from ..sampling import draw_ids, padded_laws, uniforms_for
from ..transfer import read

REMEMBERED = 32
"""Blocks that tell how many passes one needs."""


class Unmasking:
    """Runs steps of blocks alone."""

    def __init__(self, runner: Runner, kernels: Kernels) -> None:
        self._runner, self._kernels = runner, kernels
        self._needed: deque[int] = deque(maxlen=REMEMBERED)

    def run(self, batch: Sequence[Work], calls: Sequence[Call]) -> list[Result]:
        """The results of calls with a block each, once one of the blocks is done."""
        runner, mask, logits = self._runner, batch[0].sequence.mask_id, None
        rules = [call.rule for call in calls if call.rule]
        results = [Result(cells=list(call.block), settled=[-1] * len(call.block), passes=0) for call in calls]
        if any(call.runs_clean for call in calls):
            # The first pass brings rows of the text along; later ones do not.
            logits = runner.run(batch)
            calls = [replace(call, runs_clean=False) for call in calls]
            batch = [Work(w.sequence, w.end, w.end, call, w.end) for w, call in zip(batch, calls, strict=True)]
        rows = runner.plan_decoder(batch)
        draws = self._draws(batch, calls, rows.padded)
        begin = partial(_Passes, self._kernels, mask_id=mask)
        while all(mask in result.cells for result in results):
            began, known = time.perf_counter(), results[0].passes
            blocks = [(r.cells, rule) for r, rule in zip(results, rules, strict=True)]
            tensors = draws | block_tensors(blocks, runner.executor.rows(len(batch)), rows.padded, runner.device)
            behind = self._unasked(known, rules, [len(r.cells) for r in results], rows.num_rows)
            if logits is None:
                launch, out = runner.decode_passes("unmask", [rows], 1 + behind, tensors, begin)
                results = _after(results, out.tolist(), 1 + behind, mask)
                if not launch.recorded:
                    # All it took but the passes: what it takes to ask.
                    runner.costs.saw("asking", rows.num_rows, max(time.perf_counter() - began - launch.seconds, 0.0))
                self._charge(launch, rows, results, known)
                continue
            first = begin(tensors)
            first.take(padded_tensor(logits, rows.padded))
            told, logits = first.out(), None
            if not behind:
                results = _after(results, told.tolist(), 1, mask)
                continue
            launch, out = runner.decode_passes("unmask", [rows], behind, tensors | {"ids": first.ids}, begin)
            told, out = read(told, out)
            results = _after(_after(results, told, 1, mask), out, behind, mask)
            self._charge(launch, rows, results, known + 1)
        self._needed += [
            r.passes for r, c in zip(results, calls, strict=True) if mask not in r.cells and set(c.block) == {mask}
        ]
        return results

    def _unasked(self, known: int, rules: Sequence[Unmask], sizes: Sequence[int], rows: int) -> int:
        """How many passes to launch unasked behind the next, where so many are known not to have been enough. A block
        needs as many passes as it has cells at most, and one by the rule that settles all at once."""
        most = max(1 if rule.rule == "one_step" else size for rule, size in zip(rules, sizes, strict=True))

        def chance(number: int) -> float:
            """That one of the blocks needs a pass of this number, from 1 on."""
            share = sum(passes >= number for passes in self._needed) / len(self._needed)
            return 1 - (1 - share) ** len(sizes)

        behind = 0
        policy = self._runner.ahead.blocks
        if policy != "never" and self._needed and (undone := chance(known + 1)):
            needed = 0.0 if policy == "always" else undone / (1 + self._runner.costs.asking(rows))
            while known + 1 + behind < most and chance(known + 2 + behind) >= needed:
                behind += 1
        return behind

    def _charge(self, launch: StageCall, rows: DecoderRows, results: Sequence[Result], before: int) -> None:
        """Passes over blocks that were done are padding, and nobody's."""
        for n in range(before, max(r.passes for r in results)):
            self._runner.charge(launch, [row for row, r in zip(rows.works, results, strict=True) if r.passes > n])
        self._runner.finish(launch)

    def _draws(self, batch: Sequence[Work], calls: Sequence[Call], padded: int) -> dict[str, Tensor]:
        """How cells are drawn, all laid end to end."""
        device = self._runner.device
        cells = [
            (w.sequence, call.start + place)
            for w, call in zip(batch, calls, strict=True)
            for place in range(len(call.block))
        ]
        params = [cell_params(sequence.request) for sequence, _ in cells]
        uniforms = [uniform(*cell) for cell in cells] + [0.0] * (padded - len(cells))
        laws = padded_laws(params, padded, self._runner.vocab_size, device)
        draws = uniforms_for(laws, uniforms, device)
        return laws if draws is None else laws | {"uniforms": draws}


class _Passes(BlockPasses):
    """See `engine.step.runner.PassState`."""

    def take(self, logits: Tensor) -> None:
        law = self.law(logits)
        drawn, highest = draw_ids(law, self._tensors, self._tensors.get("uniforms"), self._kernels)
        self.settle(law, drawn, highest)

    def out(self) -> Tensor:
        """(3, S, B) int64: the cells, when they were settled, whether their logits were bad."""
        return torch.stack((self.ids, self.when, self.bad.long()))


def _after(blocks: Sequence[Result], told: Sequence[list[list[int]]], passes: int, mask: int) -> list[Result]:
    """Blocks after so many more passes. told: what `_Passes.out` gives. Raises FloatingPointError if a pass gave one no
    distribution."""
    after = []
    for block, ids, when, bad in zip(blocks, *told, strict=False):
        size = len(block.cells)
        if any(bad):
            raise FloatingPointError("the logits of a block are no distribution: NaN, +inf or all -inf")
        settled = [now + block.passes if now >= 0 else then for now, then in zip(when, block.settled, strict=False)]
        number = block.passes + passes if mask in ids[:size] else 1 + max(settled)
        after.append(Result(cells=ids[:size], settled=settled[:size], passes=number))
    return after
