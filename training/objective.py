"""The Fast-BLT objective: predict the next byte, and predict corrupted blocks that begin where patches begin.

Fast BLT 3.2, equations 5 to 7, with three choices that keep the expected loss but make it less noisy or cheaper: only
some of a text's blocks are drawn, each weighted by the number it stands for; every block has its own corruption rate;
the rates are spread evenly over a batch. Rates below `MIN_RATE` are not drawn, for 1/t explodes.

All runs on the device of its tensors, except that the host draws the random numbers, the same for every device.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import PAD_ID, ModelConfig
from engine.transfer import to_device

from . import model
from .model import Blocks, Clean, Patches, Weights

MIN_RATE = 0.05

Continued = Callable[[Tensor], Tensor]
"""Continuations of the first B' texts from each of their places (B', S): ids (B', S, K)."""


@dataclass(frozen=True, slots=True)
class Corruption:
    """Blocks drawn for one batch, and their targets.

    targets (B, S, K): the cells' own bytes, unshifted. scores (B, S, K) bool: which cells are scored: masked ones that
    hold a byte of the text. rates (B, S): t. stands_for (B, S): how many of the text's blocks each stands for.
    """

    blocks: Blocks
    targets: Tensor
    scores: Tensor
    rates: Tensor
    stands_for: Tensor


@dataclass(frozen=True, slots=True)
class Loss:
    """Numbers, still on their device. nats: per byte of text, differentiable. right: the share predicted."""

    nats: Tensor
    right: Tensor


def corrupt(
    config: ModelConfig,
    row: Tensor,
    patches: Patches,
    per_text: int,
    draw: torch.Generator,
    rate: float | None = None,
    full_share: float = 0.0,
    own_share: float = 0.0,
    continued: Continued | None = None,
) -> Corruption:
    """Draws up to `per_text` blocks of every text in `row` (B, T + 1) and masks each at its rate, or all at `rate`.
    `full_share` of them are masked whole.

    A block starts with a patch, the first patch (BOS alone) excepted, and runs for `block_size` bytes whatever the
    patches are; past the row's end it is padded with PAD, which is not scored.

    `own_share` of the texts, the first ones, have blocks that start anywhere but at BOS, as those of `blt-dv` do, and
    hold what `continued` gives. If that is no whole number of texts, it is so on average.
    """
    assert config.block_size is not None and config.mask_id is not None
    count, size, width = len(row), config.block_size, row.shape[1]
    most, device = patches.starts.shape[1], row.device

    def uniform(*shape: int) -> Tensor:
        return to_device(torch.rand(shape, generator=draw).numpy(), device)

    eligible = torch.arange(most, device=device) < patches.counts[:, None]
    eligible[:, 0] = False
    eligible &= row.gather(1, patches.starts.clamp(max=width - 1)) != PAD_ID
    # As many as there can be patches: a near-tie may change their number from device to device.
    tickets = uniform(count, width)
    drawn = tickets[:, :most].masked_fill(~eligible, 2.0).topk(min(per_text, most), largest=False)
    chosen, real = drawn.indices, drawn.values < 2.0
    starts, before = patches.starts.gather(1, chosen), (chosen - 1).clamp(min=0)
    share = round(own_share * count, 6)  # a product such as 0.29 * 100 is a little less than 29
    own = int(share)
    # Drawn only where needed, so that all other runs have the numbers that they would have without it.
    if fraction := share - own:
        own += float(torch.rand((), generator=draw)) < fraction
    if own:
        anywhere = tickets[:own].masked_fill(row[:own] == PAD_ID, 2.0)
        anywhere[:, 0] = 2.0
        drawn = anywhere.topk(chosen.shape[1], largest=False)
        starts[:own], real[:own] = drawn.indices.clamp(min=1), drawn.values < 2.0
        before[:own] = patches.reads[:own].gather(1, starts[:own] - 1)
    cells = starts[..., None] + torch.arange(size, device=device)
    targets = row.gather(1, cells.clamp(max=width - 1).flatten(1)).view_as(cells)
    targets = targets.masked_fill(cells >= width, PAD_ID)
    if own and continued is not None:
        targets[:own] = continued(starts[:own])

    if rate is None:
        places = to_device(torch.randperm(chosen.numel(), generator=draw).numpy(), device).view_as(chosen)
        spread = (1 - full_share) * chosen.numel()
        rates = MIN_RATE + (1 - MIN_RATE) * (places + uniform(*chosen.shape)) / max(spread, 1.0)
        rates = torch.where(places < spread, rates, 1.0).clamp(max=1.0)
    else:
        rates = torch.full(chosen.shape, rate, device=device)
    masked = uniform(*cells.shape) < rates[..., None]
    masked &= targets != PAD_ID
    blocks = Blocks(targets.masked_fill(masked, config.mask_id), starts, before)
    stands_for = eligible.sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1) * real
    return Corruption(blocks, targets, masked & real[..., None], rates, stands_for)


def next_bytes(
    config: ModelConfig, weights: Weights, row: Tensor, patches: Patches, dtype: torch.dtype, *, recompute: bool = False
) -> tuple[Clean, Loss]:
    """The clean rows of the texts in `row` (B, T + 1), and their loss: row j predicts byte j + 1, the last one too."""
    ids, after = row[:, :-1], row[:, 1:]
    clean = model.clean_rows(config, weights, ids, patches, dtype, recompute=recompute)
    logits = model.logits(config, weights, clean.rows, dtype)
    nats = F.cross_entropy(logits.flatten(0, 1), after.flatten(), ignore_index=PAD_ID)
    return clean, Loss(nats, _share_right(logits, after, after != PAD_ID))


def block_bytes(
    config: ModelConfig,
    weights: Weights,
    row: Tensor,
    clean: Clean,
    corruption: Corruption,
    dtype: torch.dtype,
    *,
    recompute: bool = False,
) -> Loss:
    """The loss of the blocks of the texts in `row` (B, T + 1). Unscored cells are computed with weight 0: to select the
    others, the host would have to wait for the device."""
    scores, targets = corruption.scores, corruption.targets
    cells = model.block_rows(config, weights, clean, corruption.blocks, dtype, recompute=recompute)
    logits = model.logits(config, weights, cells, dtype)
    weight = (corruption.stands_for / corruption.rates)[..., None] * scores
    nats = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none")
    of_text = (row[:, 1:] != PAD_ID).sum()
    return Loss((nats * weight.flatten()).sum() / of_text, _share_right(logits, targets, scores))


def patcher_loss(config: ModelConfig, weights: Weights, row: Tensor, dtype: torch.dtype) -> Tensor:
    """Next-byte loss of the patcher on `row` (B, T + 1), nats per byte."""
    found = model.patcher_logits(config, weights, row[:, :-1], dtype).flatten(0, 1)
    return F.cross_entropy(found, row[:, 1:].flatten(), ignore_index=PAD_ID)


def _share_right(found: Tensor, wanted: Tensor, asked: Tensor) -> Tensor:
    return ((found.detach().argmax(-1) == wanted) & asked).sum() / asked.sum()
