"""Passes over blocks: as many in one launch as they will probably need.

Only the device knows whether a block is done. While the host reads that, the device is idle; but a superfluous pass
takes time too. So one more pass is launched without reading as long as that costs less, by the number of passes that
recent blocks have needed.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from msgspec.structs import replace
from torch import Tensor

from kernels.dispatch import Kernels

from ...config import Policy
from ...costs.latency import READBACK
from ...costs.ledger import Launch, Ledger
from ...decoders import Result, Unmask
from ...rows import Rows
from ..blocks import BlockPasses, block_tensors
from ..decoder import DecoderRows
from ..launch import padded_tensor
from ..results import cell_params, uniform
from ..sampling import draw_ids, padded_params, uniforms_for
from ..stages import Stages
from ..transfer import read

REMEMBERED = 32
"""How many recent blocks predict the passes that the next ones need."""


@dataclass(frozen=True, slots=True)
class _Blocks:
    """The blocks of a batch: their rows of the decoder stage, and how their cells are drawn."""

    asks: Sequence[Unmask]
    mask: int
    rows: DecoderRows
    draws: dict[str, Tensor]

    @property
    def most_passes(self) -> int:
        """A block needs at most one pass per cell, and only one by the rule that settles all at once."""
        return max(1 if ask.rule.rule == "one_step" else len(ask.block) for ask in self.asks)


class BlocksAhead:
    """Runs steps of blocks alone."""

    def __init__(self, stages: Stages, ledger: Ledger, kernels: Kernels) -> None:
        self._stages, self._ledger, self._kernels = stages, ledger, kernels
        self._device = stages.launcher.device
        self._needed: deque[int] = deque(maxlen=REMEMBERED)

    def run(self, batch: Sequence[Rows], policy: Policy) -> list[Result] | None:
        """The results once one of the blocks is done; None, with nothing done, if a block has a lead."""
        asks = [rows.ask for rows in batch if isinstance(rows.ask, Unmask)]
        if any(ask.lead for ask in asks):
            return None
        mask, logits = batch[0].sequence.mask_id, None
        results = [Result(list(ask.block), settled=[-1] * len(ask.block), passes=0) for ask in asks]
        if any(rows.num_text for rows in batch):
            # The first pass brings rows of the text along; later ones do not.
            logits = self._stages.run(batch)
            batch = [_without_text(rows) for rows in batch]
        planned = self._stages.plan_decoder(batch)
        blocks = _Blocks(asks, mask, planned, self._draws(batch, planned.padded))
        begin = partial(_Passes, self._kernels, mask_id=mask)
        while all(mask in result.ids for result in results):
            began, known = time.perf_counter(), results[0].passes
            further = self._further(known, blocks, policy)
            tensors = self._tensors(blocks, results)
            if logits is None:
                results = self._launch_and_read(blocks, tensors, results, 1 + further, began)
                continue
            first = begin(tensors)
            first.take(padded_tensor(logits, planned.padded))
            out, logits = first.out(), None
            if not further:
                results = _after(results, out.tolist(), 1, mask)
                continue
            launch, rest = self._passes(blocks, tensors | {"ids": first.ids}, further)
            out, rest = read(out, rest)
            results = _after(_after(results, out, 1, mask), rest, further, mask)
            self._charge(launch, planned, results, known + 1)
        self._needed += [
            result.passes
            for result, ask in zip(results, asks, strict=True)
            if mask not in result.ids and set(ask.block) == {mask}
        ]
        return results

    def _launch_and_read(
        self, blocks: _Blocks, tensors: dict[str, Tensor], results: list[Result], passes: int, began: float
    ) -> list[Result]:
        """The blocks after so many more passes. began: when it was decided how many."""
        known = results[0].passes
        launch, out = self._passes(blocks, tensors, passes)
        results = _after(results, out.tolist(), passes, blocks.mask)
        if not launch.recorded:
            # All it took but the passes: what it takes to send the blocks, launch and read.
            seconds = max(time.perf_counter() - began - self._ledger.seconds(launch), 0.0)
            self._ledger.latency.observe(READBACK, blocks.rows.num_rows, seconds)
        self._charge(launch, blocks.rows, results, known)
        return results

    def _passes(self, blocks: _Blocks, tensors: dict[str, Tensor], passes: int) -> tuple[Launch, Tensor]:
        begin = partial(_Passes, self._kernels, mask_id=blocks.mask)
        return self._stages.decoder.launch_passes("unmask", [blocks.rows], passes, tensors, begin)

    def _further(self, known: int, blocks: _Blocks, policy: Policy) -> int:
        """How many passes to launch after the next before reading back. known: passes that were not enough."""

        def chance(number: int) -> float:
            """The probability that one of the blocks needs its pass `number`, counted from 1."""
            share = sum(passes >= number for passes in self._needed) / len(self._needed)
            return 1 - (1 - share) ** len(blocks.asks)

        further = 0
        if policy != "never" and self._needed and (undone := chance(known + 1)):
            readback = self._ledger.latency.readback(blocks.rows.num_rows)
            needed = 0.0 if policy == "always" else undone / (1 + readback)
            while known + 1 + further < blocks.most_passes and chance(known + 2 + further) >= needed:
                further += 1
        return further

    def _charge(self, launch: Launch, planned: DecoderRows, results: Sequence[Result], before: int) -> None:
        """Passes over blocks that were done are padding, and charged to no request."""
        self._ledger.took(
            launch,
            *(
                [share for share, result in zip(planned.shares, results, strict=True) if result.passes > number]
                for number in range(before, max(result.passes for result in results))
            ),
        )

    def _tensors(self, blocks: _Blocks, results: Sequence[Result]) -> dict[str, Tensor]:
        """The blocks as they are now."""
        now = [(result.ids, ask.rule) for result, ask in zip(results, blocks.asks, strict=True)]
        num_blocks = self._stages.launcher.executor.rows(len(now))
        return blocks.draws | block_tensors(now, num_blocks, blocks.rows.padded, self._device)

    def _draws(self, batch: Sequence[Rows], padded: int) -> dict[str, Tensor]:
        """How cells are drawn, all laid end to end."""
        cells = [(rows.sequence, rows.cells_start + cell) for rows in batch for cell in range(rows.num_block)]
        params = [cell_params(sequence.request) for sequence, _ in cells]
        uniforms = [uniform(*cell) for cell in cells] + [0.0] * (padded - len(cells))
        tensors = padded_params(params, padded, self._stages.decoder.vocab_size, self._device)
        draws = uniforms_for(tensors, uniforms, self._device)
        return tensors if draws is None else tensors | {"uniforms": draws}


def _without_text(rows: Rows) -> Rows:
    """The same block, once the text before it has run."""
    end = rows.end
    return replace(rows, start=end, logits_from=end, decode_from=end, counted_from=0)


class _Passes(BlockPasses):
    """See `engine.step.decoder.PassState`."""

    def take(self, logits: Tensor) -> None:
        allowed = self.allowed(logits)
        drawn, highest = draw_ids(allowed, self._tensors, self._tensors.get("uniforms"), self._kernels)
        self.settle(allowed, drawn, highest)

    def out(self) -> Tensor:
        """(3, S, B) int64: the cells, when they were settled, whether their logits were bad."""
        return torch.stack((self.ids, self.when, self.bad.long()))


def _after(blocks: Sequence[Result], out: Sequence[list[list[int]]], passes: int, mask: int) -> list[Result]:
    """Blocks after `passes` more passes. out: of `_Passes`. Raises FloatingPointError if a block's logits are no
    distribution."""
    after = []
    for block, ids, when, bad in zip(blocks, *out, strict=False):
        size = len(block.ids)
        if any(bad):
            raise FloatingPointError("the logits of a block are no distribution: NaN, +inf or all -inf")
        settled = [now + block.passes if now >= 0 else then for now, then in zip(when, block.settled, strict=False)]
        number = block.passes + passes if mask in ids[:size] else 1 + max(settled)
        after.append(Result(ids[:size], settled=settled[:size], passes=number))
    return after
