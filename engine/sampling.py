"""From logits to ids.

A row's result is bitwise the same alone and in any batch: every operation is row-wise over the vocabulary, and
probabilities become integers before they are summed, so that no order of summation can matter.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .types import SamplingParams, TokenLogprob

_MASS_SCALE = 2.0**52
"""Probabilities are counted in units of 1 / this; a row's sum still fits a float64 exactly."""
_MASK_64 = 2**64 - 1


def choose(
    logits: Tensor, params: Sequence[SamplingParams], counts: Sequence[Mapping[int, int]], uniforms: Sequence[float]
) -> Tensor:
    """One id per row.

    logits (R, V) float32; counts: how often each id was generated, per row; uniforms: a draw in [0, 1) per row, which
    only rows with temperature > 0 use. Returns (R,) int64. Equal logits rank by id, lower first.
    Raises FloatingPointError for a row that is no distribution (NaN, +inf, or nothing above -inf).
    """
    _check(logits)
    changes = [_logit_changes(p, c, logits.shape[1]) for p, c in zip(params, counts, strict=True)]
    sampled = [row for row, p in enumerate(params) if p.temperature > 0]
    if not sampled and not any(changes):
        return logits.argmax(-1)
    adjusted = logits.double()
    if any(changes):
        rows = [row for row, change in enumerate(changes) for _ in change]
        ids = [i for change in changes for i in change]
        values = adjusted.new_tensor([value for change in changes for value in change.values()])
        adjusted[rows, ids] += values
    chosen = adjusted.argmax(-1)
    if sampled:
        chosen[sampled] = _sample(adjusted[sampled], [params[r] for r in sampled], [uniforms[r] for r in sampled])
    return chosen


def draw(seed: int, sample_index: int, position: int) -> float:
    """A uniform number in [0, 1) for one position of one sample.

    Counter-based (Philox; Salmon et al. 2011): it depends on nothing but its arguments, so that a preempted or
    restarted request goes on with its own stream.
    """
    # One 128-bit integer: numpy would round a list of large ones to floats.
    key = (sample_index & _MASK_64) << 64 | seed & _MASK_64
    stream = np.random.Philox(key=key, counter=position)
    return (int(stream.random_raw()) >> 11) * 2.0**-53


def logprobs_of(logits: Tensor, chosen: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """Log-probabilities of the chosen ids and of the `num_top` likeliest ones, likeliest first.

    logits (R, V) float32, as the model gave them; chosen: R ids.
    """
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(chosen, dtype=torch.int64, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = logprobs.sort(dim=-1, descending=True, stable=True)
    top_ids, top_values = ids[:, :num_top].tolist(), values[:, :num_top].tolist()
    return [
        TokenLogprob(id=i, logprob=value, top=dict(zip(row_ids, row_values, strict=True)))
        for i, value, row_ids, row_values in zip(chosen, own, top_ids, top_values, strict=True)
    ]


def _check(logits: Tensor) -> None:
    # The maximum is NaN if any logit is.
    finite = logits.amax(-1).isfinite()
    if not finite.all():
        row = int((~finite).nonzero()[0, 0])
        raise FloatingPointError(f"the logits of row {row} are no distribution: NaN, +inf or all -inf")


def _logit_changes(params: SamplingParams, counts: Mapping[int, int], vocab_size: int) -> dict[int, float]:
    """What bias and penalties add to a row's logits, by id. A bias on an id outside the vocabulary has no effect."""
    change = {i: bias for i, bias in params.logit_bias.items() if 0 <= i < vocab_size}
    if params.presence_penalty or params.frequency_penalty:
        for i, count in counts.items():
            change[i] = change.get(i, 0.0) - params.presence_penalty - params.frequency_penalty * count
    return change


def _sample(logits: Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    """Temperature, top_k, top_p, min_p, then the inverse of the distribution function in id order. logits (R, V)."""

    def column(values: list[float]) -> Tensor:
        return logits.new_tensor(values)[:, None]

    vocab_size = logits.shape[1]
    # The maximum goes first, so that no temperature, however small, overflows.
    scaled = (logits - logits.amax(-1, keepdim=True)) / column([p.temperature for p in params])
    mass = (scaled.softmax(-1) * _MASS_SCALE).long()
    if any(p.top_k or p.top_p < 1 for p in params):
        order = scaled.sort(dim=-1, descending=True, stable=True).indices
        rank = torch.arange(vocab_size, device=logits.device)
        top_k = column([p.top_k or vocab_size for p in params])
        ranked = mass.gather(1, order).where(rank < top_k, 0)
        before = ranked.cumsum(-1) - ranked
        in_top_p = before < column([p.top_p for p in params]) * ranked.sum(-1, keepdim=True)
        # top_p 0 still keeps the likeliest id.
        mass = torch.zeros_like(mass).scatter(1, order, ranked.where(in_top_p | (rank == 0), 0))
    if any(p.min_p for p in params):
        mass = mass.where(mass >= column([p.min_p for p in params]) * mass.amax(-1, keepdim=True), 0)
    cdf = mass.cumsum(-1)
    total = cdf[:, -1:]
    target = (column(list(uniforms)) * total).long().minimum(total - 1)
    return (cdf <= target).sum(-1)
