"""From logits to ids: what a request's parameters do to its rows before `kernels.sampling` draws."""

from collections.abc import Mapping, Sequence
from math import isfinite

import numpy as np
import torch
from torch import Tensor

from kernels.dispatch import Kernels

from .types import SamplingParams, TokenLogprob

_MASK_64 = 2**64 - 1


class Chooser:
    """How some rows become ids. Made once where the same rows are chosen for in several passes.

    counts: how often each id was generated, per row. Everything is on `device` once it is made.
    """

    def __init__(
        self,
        params: Sequence[SamplingParams],
        counts: Sequence[Mapping[int, int]],
        vocab_size: int,
        device: torch.device,
        kernels: Kernels,
    ) -> None:
        self._kernels = kernels
        changes = [_logit_changes(p, c, vocab_size) for p, c in zip(params, counts, strict=True)]
        self._changes = None
        if any(changes):
            self._changes = torch.zeros(len(params), vocab_size, dtype=torch.float64)
            for row, change in zip(self._changes, changes, strict=True):
                row[list(change)] = torch.tensor(list(change.values()), dtype=torch.float64)
            self._changes = self._changes.to(device)
        self._laws = None
        if any(p.temperature > 0 for p in params):
            laws = [[p.temperature, p.top_k or vocab_size, p.top_p, p.min_p] for p in params]
            temperature, top_k, top_p, min_p = torch.tensor(laws, dtype=torch.float64, device=device).T.contiguous()
            self._laws = temperature, top_k.long(), top_p, min_p

    def __call__(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """One id per row, (R,) int64, from logits (R, V) float32. Equal logits rank by id, lower first.

        uniforms (R,) float64: a draw in [0, 1) per row, which only rows with temperature > 0 use.
        """
        if self._changes is None and self._laws is None:
            return logits.argmax(-1)
        adjusted = logits.double()
        if self._changes is not None:
            adjusted += self._changes
        if self._laws is None:
            return adjusted.argmax(-1)
        return self._kernels.sample(adjusted, *self._laws, uniforms)


def choose(
    logits: Tensor,
    params: Sequence[SamplingParams],
    counts: Sequence[Mapping[int, int]],
    uniforms: Sequence[float],
    kernels: Kernels,
) -> Tensor:
    """One id per row, as `Chooser` chooses.

    Raises FloatingPointError for a row that is no distribution (NaN, +inf, or nothing above -inf).
    """
    check(logits)
    chooser = Chooser(params, counts, logits.shape[1], logits.device, kernels)
    return chooser(logits, torch.tensor(uniforms, dtype=torch.float64, device=logits.device))


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


def check(logits: Tensor) -> None:
    """Raises FloatingPointError for a row that is no distribution."""
    # The maximum is NaN if any logit is.
    for row, highest in enumerate(logits.amax(-1).tolist()):
        if not isfinite(highest):
            raise FloatingPointError(f"the logits of row {row} are no distribution: NaN, +inf or all -inf")


def _logit_changes(params: SamplingParams, counts: Mapping[int, int], vocab_size: int) -> dict[int, float]:
    """What bias and penalties add to a row's logits, by id. A bias on an id outside the vocabulary has no effect."""
    change = {i: bias for i, bias in params.logit_bias.items() if 0 <= i < vocab_size}
    if params.presence_penalty or params.frequency_penalty:
        for i, count in counts.items():
            change[i] = change.get(i, 0.0) - params.presence_penalty - params.frequency_penalty * count
    return change
