"""Blocks of cells on the device: which cells are masked, and what they become in each pass (Fast BLT 3.1)."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.dispatch import Kernels
from kernels.unmasking import CONFIDENCE, ENTROPY, ENTROPY_MINUS_MAX, ONE_STEP

from ..config import BOE_ID, BOS_ID, PAD_ID
from ..decoders import Unmask
from ..memory.text import Slots
from ..rows import Rows
from ..types import UnmaskRule
from .transfer import to_device

BLOCK_SPECIALS = [BOE_ID, BOS_ID, PAD_ID]
"""Ids that a block's cell never becomes."""


def block_tensors(
    batch: Sequence[Rows], num_blocks: int, num_cells: int, slots: Slots, device: torch.device
) -> dict[str, Tensor]:
    """Where the blocks of some `Unmask`s lie, and their rules, padded to `num_blocks` blocks and `num_cells` cells.

    places (C,) int64: of each cell in the text, all laid end to end; flat (C,) int64: its index in a grid (S, B) of
    blocks, flattened, S * B for padding; rules (S,) int64 and bounds (S,) float64 as in `kernels.unmasking`; specials
    (3,) int64; width (B,) int64, zeros.
    """
    width = max(rows.num_block for rows in batch)
    places: list[int] = []
    flat: list[int] = []
    rules, bounds = [ONE_STEP] * num_blocks, [0.0] * num_blocks
    for number, rows in enumerate(batch):
        assert isinstance(rows.ask, Unmask)
        at = slots.place(rows.sequence, rows.reach - rows.num_block)
        places += range(at, at + rows.num_block)
        flat += range(number * width, number * width + rows.num_block)
        rules[number], bounds[number] = rule_and_bound(rows.ask.rule)
    padding = num_cells - len(flat)
    return {
        "places": to_device(np.array(places + [0] * padding), device),
        "flat": to_device(np.array(flat + [num_blocks * width] * padding), device),
        "rules": to_device(np.array(rules), device),
        "bounds": to_device(np.array(bounds), device),
        "specials": to_device(np.array(BLOCK_SPECIALS), device),
        "width": torch.zeros(width, dtype=torch.int64, device=device),
    }


class BlockPasses:
    """Some passes over blocks, from `block_tensors`: uses only tensors, so that it can be recorded. The cells are in
    the text; every pass reads and writes them there.

    ids (S, B): the cells as they are now. when (S, B): the pass in which each was settled, -1 if in none. bad (S, B):
    whether a cell's logits were no distribution.
    """

    def __init__(self, kernels: Kernels, text_ids: Tensor, tensors: Mapping[str, Tensor], *, mask_id: int) -> None:
        self._kernels, self._text_ids, self._tensors = kernels, text_ids, tensors
        self._shape = len(tensors["rules"]), len(tensors["width"])
        self.ids = self._grid(text_ids.index_select(0, tensors["places"]))
        self._masked = self.ids == mask_id
        self.when = torch.full_like(self.ids, -1)
        self.bad = torch.zeros_like(self._masked)
        self._passes = 0

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
        cells = pad(self.ids.flatten(), (0, 1)).index_select(0, self._tensors["flat"])
        self._text_ids.index_copy_(0, self._tensors["places"], cells)

    def _grid(self, cells: Tensor) -> Tensor:
        """Cells laid end to end (C,) as a grid (S, B), zeros after a shorter block."""
        size = self._shape[0] * self._shape[1]
        return cells.new_zeros(size + 1).index_copy(0, self._tensors["flat"], cells)[:size].view(self._shape)


def rule_and_bound(rule: UnmaskRule) -> tuple[int, float]:
    """The rule's number in `kernels.unmasking`, and its bound."""
    if rule.rule == "confidence":
        return CONFIDENCE, rule.alpha
    if rule.rule == "entropy":
        return (ENTROPY_MINUS_MAX if rule.minus_max else ENTROPY), rule.gamma
    return ONE_STEP, 0.0
