"""Blocks of cells on the device: which cells are masked, and what they become in each pass (Fast BLT 3.1)."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.dispatch import Kernels
from kernels.unmasking import CONFIDENCE, ENTROPY, ENTROPY_MINUS_MAX, ONE_STEP

from ..config import BOE_ID, BOS_ID, PAD_ID
from ..types import UnmaskRule
from .transfer import to_device

BLOCK_SPECIALS = [BOE_ID, BOS_ID, PAD_ID]
"""Ids that a block's cell never becomes."""
NO_CELL = -1


def block_tensors(
    blocks: Sequence[tuple[Sequence[int], UnmaskRule]], num_blocks: int, num_cells: int, device: torch.device
) -> dict[str, Tensor]:
    """Blocks before some passes, from their ids and rules, padded to `num_blocks` blocks and `num_cells` cells.

    ids (S, B) int64: a row per block, `NO_CELL` after a shorter one; flat (C,) int64: for each cell, all laid end to
    end, its index in `ids.flatten()`, S * B for padding; rules (S,) int64 and bounds (S,) float64 as in
    `kernels.unmasking`; specials (3,) int64.
    """
    width = max(len(ids) for ids, _ in blocks)
    padding = num_blocks - len(blocks)
    grid = [[*ids, *[NO_CELL] * (width - len(ids))] for ids, _ in blocks] + [[NO_CELL] * width] * padding
    flat = [row * width + place for row, (ids, _) in enumerate(blocks) for place in range(len(ids))]
    rules, bounds = zip(*(rule_and_bound(rule) for _, rule in blocks), strict=True)
    return {
        "ids": to_device(np.array(grid), device),
        "flat": to_device(np.array(flat + [num_blocks * width] * (num_cells - len(flat))), device),
        "rules": to_device(np.array([*rules, *[ONE_STEP] * padding]), device),
        "bounds": to_device(np.array([*bounds, *[0.0] * padding]), device),
        "specials": to_device(np.array(BLOCK_SPECIALS), device),
    }


class BlockPasses:
    """Some passes over blocks, from `block_tensors`: uses only tensors, so that it can be recorded.

    ids (S, B): the cells as they are now. when (S, B): the pass in which each was settled, -1 if in none. bad (S, B):
    whether a cell's logits were no distribution.
    """

    def __init__(self, kernels: Kernels, tensors: Mapping[str, Tensor], *, mask_id: int) -> None:
        self._kernels, self._tensors = kernels, tensors
        self.ids = tensors["ids"]
        self._masked = self.ids == mask_id
        self.when = torch.full_like(self.ids, -1)
        self.bad = torch.zeros_like(self._masked)
        self._passes = 0

    @property
    def cells(self) -> Tensor:
        """The ids of all cells laid end to end, (C,)."""
        return pad(self.ids.flatten(), (0, 1)).index_select(0, self._tensors["flat"])

    def allowed(self, logits: Tensor) -> Tensor:
        """The logits (C, V) that cells are drawn from: without the ids that they never become."""
        return logits.index_fill(1, self._tensors["specials"], -torch.inf)

    def settle(self, logits: Tensor, drawn: Tensor, highest: Tensor) -> None:
        """Ends a pass. logits (C, V): from `allowed`; drawn, highest (C,): the ids drawn from these, and the largest
        logits."""
        confidence, entropy, best = (self._grid(t) for t in (*self._kernels.confidence_and_entropy(logits), highest))
        rules, bounds = self._tensors["rules"], self._tensors["bounds"]
        settled = self._kernels.unmask(self._masked, confidence, entropy, rules, bounds)
        self.ids = self.ids.where(~settled, self._grid(drawn))
        self.when = self.when.masked_fill(settled, self._passes)
        self.bad = self.bad | (self._masked & ~best.isfinite())
        self._masked = self._masked & ~settled
        self._passes += 1

    def _grid(self, cells: Tensor) -> Tensor:
        """Cells laid end to end (C,) as a grid (S, B)."""
        size = self.ids.numel()
        return cells.new_zeros(size + 1).index_copy(0, self._tensors["flat"], cells)[:size].view(self.ids.shape)


def rule_and_bound(rule: UnmaskRule) -> tuple[int, float]:
    """The rule's number in `kernels.unmasking`, and its bound."""
    if rule.rule == "confidence":
        return CONFIDENCE, rule.alpha
    if rule.rule == "entropy":
        return (ENTROPY_MINUS_MAX if rule.minus_max else ENTROPY), rule.gamma
    return ONE_STEP, 0.0
