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
            laws = [(p.temperature, p.top_k or vocab_size, p.top_p, p.min_p) for p in params]
            self._laws = on_device(laws, device)
        self.takes_likeliest = self._changes is None and self._laws is None
        """Whether every row becomes what is likeliest as it is."""

    def __call__(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """One id per row, (R,) int64, from logits (R, V) float32. Equal logits rank by id, lower first.

        uniforms (R,) float64: a draw in [0, 1) per row, which only rows with temperature > 0 use.
        """
        if self.takes_likeliest:
            return self._kernels.likeliest(logits)[0]
        adjusted = logits if self._changes is None else logits.double() + self._changes
        if self._laws is None:
            return adjusted.argmax(-1)
        return self._kernels.sample(adjusted, self._laws, uniforms)


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
    likeliest, highest = kernels.likeliest(logits)
    check(highest)
    chooser = Chooser(params, counts, logits.shape[1], logits.device, kernels)
    return likeliest if chooser.takes_likeliest else chooser(logits, on_device(uniforms, logits.device))


def on_device(numbers: Sequence[float] | Sequence[Sequence[float]], device: torch.device) -> Tensor:
    """As float64. `torch.tensor` takes three times as long."""
    return torch.from_numpy(np.array(numbers, dtype=np.float64)).to(device)


def draw(seed: int, sample_index: int, position: int) -> float:
    """A uniform number in [0, 1) for one position of one sample.

    Counter-based (Philox 4x64-10; Salmon et al. 2011): it depends on nothing but its arguments, so that a preempted or
    restarted request goes on with its own stream. numpy has the same numbers, at twice the time for a single one.
    """
    key, other_key = seed & _MASK_64, sample_index & _MASK_64
    a, b, c, d = position + 1, 0, 0, 0
    for _ in range(10):
        first, second = a * 0xD2E7470EE14C6C93, c * 0xCA5A826395121157
        a, b, c, d = second >> 64 ^ b ^ key, second & _MASK_64, first >> 64 ^ d ^ other_key, first & _MASK_64
        key, other_key = key + 0x9E3779B97F4A7C15 & _MASK_64, other_key + 0xBB67AE8584CAA73B & _MASK_64
    return (a >> 11) * 2.0**-53


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


def check(highest: Tensor) -> None:
    """Raises FloatingPointError for a row that is no distribution. highest: its largest logit, NaN if any is."""
    for row, logit in enumerate(highest.flatten().tolist()):
        if not isfinite(logit):
            raise FloatingPointError(f"the logits of row {row} are no distribution: NaN, +inf or all -inf")


def _logit_changes(params: SamplingParams, counts: Mapping[int, int], vocab_size: int) -> dict[int, float]:
    """What bias and penalties add to a row's logits, by id. A bias on an id outside the vocabulary has no effect."""
    change = {i: bias for i, bias in params.logit_bias.items() if 0 <= i < vocab_size}
    if params.presence_penalty or params.frequency_penalty:
        for i, count in counts.items():
            change[i] = change.get(i, 0.0) - params.presence_penalty - params.frequency_penalty * count
    return change
