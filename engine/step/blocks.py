"""Blocks of cells on the device: which cells are masked, and what they become in each pass (Fast BLT 3.1)."""

from collections.abc import Sequence as Seq
from functools import cache

import numpy as np
import torch
from torch import Tensor

from kernels.dispatch import Kernels
from kernels.unmasking import CONFIDENCE, ENTROPY, ENTROPY_MINUS_MAX, ONE_STEP, Blocks

from ..config import BOE_ID, BOS_ID, PAD_ID
from ..decoders import Unmask
from ..memory.text import Slots
from ..rows import Rows
from ..transfer import to_device
from ..types import UnmaskRule

BLOCK_SPECIALS = [BOE_ID, BOS_ID, PAD_ID]
"""Ids that a block's cell never becomes."""


def block_tensors(batch: Seq[Rows], num_blocks: int, slots: Slots, device: torch.device) -> Tensor:
    """Where the blocks of some `Unmask`s lie, and their rules, padded to `num_blocks` blocks: (5, S) int64, to be
    unpacked by `BlockPasses`. Their cells are laid end to end."""
    numbers = np.zeros((5, num_blocks), dtype=np.int64)
    begin = 0
    for number, rows in enumerate(batch):
        assert isinstance(rows.ask, Unmask)
        rule, bound = rule_and_bound(rows.ask.rule)
        place = slots.place(rows.sequence, rows.reach - rows.num_block)
        numbers[:4, number] = begin, rows.num_block, place, rule
        numbers[4, number] = np.float64(bound).view(np.int64)
        begin += rows.num_block
    return to_device(numbers, device)


@cache
def _specials(device: torch.device) -> Tensor:
    return torch.tensor(BLOCK_SPECIALS, device=device)


class BlockPasses:
    """Some passes over blocks, from `block_tensors`: uses only tensors, so that it can be recorded. The cells are in
    the text; every pass reads and writes them there.

    cells (3, S, B): as `kernels.unmasking.composed_settle` describes them.
    """

    def __init__(self, kernels: Kernels, text_ids: Tensor, blocks: Tensor, width: int, *, mask_id: int) -> None:
        """width: cells of the longest block."""
        self._kernels, self._text_ids, self._mask_id = kernels, text_ids, mask_id
        begin, size, place, rules, bounds = blocks.unbind()
        self._blocks = Blocks(begin, size, place, rules, bounds.view(torch.float64))
        self.cells = blocks.new_empty(3, len(begin), width)
        self._passes = 0

    def allowed(self, logits: Tensor) -> Tensor:
        """The logits (C, V) that cells are drawn from, in place: without the ids that they never become."""
        return logits.index_fill_(1, _specials(logits.device), -torch.inf)

    def settle(self, logits: Tensor, drawn: Tensor) -> None:
        """Ends a pass. logits (C, V): from `allowed`; drawn (C,): the ids drawn from these."""
        self._kernels.settle(self.cells, self._text_ids, logits, drawn, self._blocks, self._passes, self._mask_id)
        self._passes += 1


def rule_and_bound(rule: UnmaskRule) -> tuple[int, float]:
    """The rule's number in `kernels.unmasking`, and its bound."""
    if rule.rule == "confidence":
        return CONFIDENCE, rule.alpha
    if rule.rule == "entropy":
        return (ENTROPY_MINUS_MAX if rule.minus_max else ENTROPY), rule.gamma
    return ONE_STEP, 0.0
