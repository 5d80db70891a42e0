"""The Fast-BLT objective: predict the next byte, and predict corrupted blocks that begin where patches begin.

Fast BLT 3.2, equations 5 to 7, with three choices that leave the expected loss what it is and make it less noisy or
cheaper: only some of a text's blocks are drawn, each weighing as many as it stands for; every block has a corruption
rate of its own; the rates are spread evenly over a batch. Rates below `MIN_RATE` are not drawn, for 1/t explodes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import PAD_ID, ModelConfig

from . import model
from .model import Blocks, Patches, Weights

MIN_RATE = 0.05


@dataclass(frozen=True, slots=True)
class Corruption:
    """Blocks drawn for one batch, and what is asked of them.

    targets (B, S, K): the cells' own bytes, unshifted. scores (B, S, K) bool: which cells are asked for: masked ones
    that hold a byte of the text. rates (B, S): t. stands_for (B, S): how many of the text's blocks each stands for.
    """

    blocks: Blocks
    targets: Tensor
    scores: Tensor
    rates: Tensor
    stands_for: Tensor


@dataclass(frozen=True, slots=True)
class Losses:
    """`clean` and `mask` in nats per byte of text, differentiable; `..._right`: shares guessed."""

    clean: Tensor
    mask: Tensor
    clean_right: float
    mask_right: float


def corrupt(
    config: ModelConfig, row: Tensor, patches: Patches, per_text: int, draw: torch.Generator, rate: float | None = None
) -> Corruption:
    """Draws up to `per_text` blocks of every text in `row` (B, T + 1) and masks each at its rate, or all at `rate`.

    A block starts with a patch, the first patch (BOS alone) excepted, and runs for `block_size` bytes whatever the
    patches are; where the row ends, it is filled up with PAD, which is not asked for.
    """
    assert config.block_size is not None and config.mask_id is not None
    count, size, width = len(row), config.block_size, row.shape[1]
    most = patches.starts.shape[1]
    eligible = torch.arange(most) < patches.counts[:, None]
    eligible[:, 0] = False
    eligible &= row.gather(1, patches.starts.clamp(max=width - 1)) != PAD_ID
    lottery = torch.rand(count, most, generator=draw).masked_fill(~eligible, 2.0)
    drawn = lottery.topk(min(per_text, most), largest=False)
    chosen, real = drawn.indices, drawn.values < 2.0
    starts = patches.starts.gather(1, chosen)
    cells = starts[..., None] + torch.arange(size)
    targets = row.gather(1, cells.clamp(max=width - 1).flatten(1)).view_as(cells)
    targets = targets.masked_fill(cells >= width, PAD_ID)

    if rate is None:
        places = torch.randperm(chosen.numel(), generator=draw).view_as(chosen)
        jitter = torch.rand(chosen.shape, generator=draw)
        rates = MIN_RATE + (1 - MIN_RATE) * (places + jitter) / chosen.numel()
    else:
        rates = torch.full(chosen.shape, rate)
    masked = torch.rand(cells.shape, generator=draw) < rates[..., None]
    masked &= targets != PAD_ID
    blocks = Blocks(targets.masked_fill(masked, config.mask_id), starts, (chosen - 1).clamp(min=0))
    stands_for = eligible.sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1) * real
    return Corruption(blocks, targets, masked & real[..., None], rates, stands_for)


def losses(
    config: ModelConfig, weights: Weights, row: Tensor, patches: Patches, corruption: Corruption, dtype: torch.dtype
) -> Losses:
    """Both losses of the texts in `row` (B, T + 1): clean row j is asked for byte j + 1, the last included."""
    ids, after = row[:, :-1], row[:, 1:]
    asked = after != PAD_ID
    slots = model.latents(config, weights, ids, patches, dtype)
    clean, cells = model.decode(config, weights, ids, patches.reads, slots, dtype, corruption.blocks)
    next_logits = model.logits(weights, clean[asked])
    cell_logits = model.logits(weights, cells[corruption.scores])
    next_bytes, cell_bytes = after[asked], corruption.targets[corruption.scores]
    weight = (corruption.stands_for / corruption.rates)[..., None].expand_as(corruption.scores)[corruption.scores]
    cell_loss = (F.cross_entropy(cell_logits, cell_bytes, reduction="none") * weight).sum()
    return Losses(
        F.cross_entropy(next_logits, next_bytes),
        cell_loss / len(next_bytes),
        _share_right(next_logits, next_bytes),
        _share_right(cell_logits, cell_bytes),
    )


def patcher_loss(config: ModelConfig, weights: Weights, row: Tensor, dtype: torch.dtype) -> Tensor:
    """Next-byte loss of the patcher on `row` (B, T + 1), nats per byte."""
    found = model.patcher_logits(config, weights, row[:, :-1], dtype).flatten(0, 1)
    return F.cross_entropy(found, row[:, 1:].flatten(), ignore_index=PAD_ID)


def _share_right(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().argmax(-1) == wanted).float().mean())
