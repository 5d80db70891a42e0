"""From logits to ids: applies a request's parameters to its rows before `kernels.sampling` draws."""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from math import inf, isfinite

import numpy as np
import torch
from msgspec.structs import replace
from numpy.typing import NDArray
from torch import Tensor

from kernels.dispatch import Kernels

from ..grammars import Mask
from ..transfer import read, to_device
from ..types import SamplingParams, TokenLogprob

_MASK_64 = 2**64 - 1
_PADDING = SamplingParams(temperature=0)


def row_params(
    params: Seq[SamplingParams],
    counts: Seq[Mapping[int, int]],
    vocab_size: int,
    device: torch.device,
    allowed: Seq[Mask | None] = (),
) -> dict[str, Tensor]:
    """The sampling parameters of some rows: `changes` (R, V) float64, added to the logits, and `params` (R, 4) float64,
    as in `kernels.sampling`; each only if a row needs it. If a row is penalised for repetition also `repeated` (2, R,
    V) float64: what is added to the logits before they are divided or multiplied, and by how much.

    counts: how often each id was generated, per row; repetition also counts ids that are there with 0. allowed: ids
    that may be drawn, None for all; empty if all rows may draw any.
    """
    tensors: dict[str, Tensor] = {}
    changes = [_logit_changes(p, c, vocab_size) for p, c in zip(params, counts, strict=True)]
    constrained = [(row, mask) for row, mask in enumerate(allowed) if mask is not None]
    if constrained or any(changes):
        added = np.zeros((len(params), vocab_size))
        for row, change in zip(added, changes, strict=True):
            row[list(change)] = list(change.values())
        for number, mask in constrained:
            added[number, ~mask] = -np.inf
        tensors["changes"] = to_device(added, device)
    if any(p.repetition_penalty != 1 for p in params):
        tensors["repeated"] = to_device(_repetition(params, counts, vocab_size), device)
    if any(p.temperature > 0 for p in params):
        rows = [(p.temperature, p.top_k or vocab_size, p.top_p, p.min_p) for p in params]
        tensors["params"] = on_device(rows, device)
    return tensors


def padded_params(
    params: Seq[SamplingParams],
    counts: Seq[Mapping[int, int]],
    uniforms: Seq[float] | Seq[Seq[float]],
    length: int,
    vocab_size: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """`row_params`, padded to `length` rows, and "uniforms" if any row needs one."""
    padding = length - len(params)
    tensors = row_params([*params, *[_PADDING] * padding], [*counts, *[{}] * padding], vocab_size, device)
    draws = uniforms_for(tensors, uniforms, device)
    return tensors if draws is None else tensors | {"uniforms": draws}


def counted(
    params: Seq[SamplingParams], counts: Seq[Mapping[int, int]], length: int, vocab_size: int, device: torch.device
) -> dict[str, Tensor]:
    """What `penalised` needs where passes go on: "counts" (R, V), how often each id was generated, -1 for ids that are
    not penalised, and "penalties" (R, 3): presence, frequency, repetition; float64."""
    generated = np.full((length, vocab_size), -1.0)
    penalties = np.tile([0.0, 0.0, 1.0], (length, 1))
    for row, (p, count) in enumerate(zip(params, counts, strict=True)):
        generated[row, list(count)] = list(count.values())
        penalties[row] = p.presence_penalty, p.frequency_penalty, p.repetition_penalty
    return {"counts": to_device(generated, device), "penalties": to_device(penalties, device)}


def penalised(tensors: Mapping[str, Tensor], counts: Tensor) -> dict[str, Tensor]:
    """`row_params` after ids were generated so often: (R, V), as in `counted`. tensors: made with no id counted. Every
    number is rounded as it is there."""
    presence, frequency, repetition = tensors["penalties"].unsqueeze(1).unbind(-1)
    changes = tensors.get("changes", torch.zeros_like(counts))
    less = torch.where(counts > 0, changes - presence - frequency * counts, changes)
    if (repeated := tensors.get("repeated")) is None:
        return {**tensors, "changes": less}
    factors = torch.where(counts >= 0, repetition, torch.ones_like(counts))
    return {**tensors, "changes": less, "repeated": torch.stack((repeated[0], factors))}


def uniforms_for(
    tensors: Mapping[str, Tensor], uniforms: Seq[float] | Seq[Seq[float]], device: torch.device
) -> Tensor | None:
    """The draws on the device, if any row needs one. tensors: of `row_params`."""
    return on_device(uniforms, device) if "params" in tensors else None


def draw_ids(
    logits: Tensor, tensors: Mapping[str, Tensor], uniforms: Tensor | None, kernels: Kernels
) -> tuple[Tensor, Tensor]:
    """One id per row, (R,) int64, from logits (R, V) float32, and the largest logit, NaN if any is, (R,). Equal logits
    rank by id, lower first.

    tensors: of `row_params`. uniforms (R,) float64: a draw in [0, 1) per row, which only rows with temperature > 0 use;
    None if there are no params.
    """
    ids, highest = kernels.argmax(logits)
    params, changes, repeated = (tensors.get(name) for name in ("params", "changes", "repeated"))
    if repeated is not None:
        logits, factors = logits.double() + repeated[0], repeated[1]
        logits = torch.where(logits > 0, logits / factors, logits * factors)
    if changes is not None:
        logits = logits.double() + changes
    if changes is not None or repeated is not None:
        ids = logits.argmax(-1)
    return ids if params is None or uniforms is None else kernels.sample(logits, params, uniforms), highest


def choose(
    logits: Tensor,
    params: Seq[SamplingParams],
    counts: Seq[Mapping[int, int]],
    uniforms: Seq[float],
    allowed: Seq[Mask | None],
    kernels: Kernels,
) -> tuple[Tensor, Tensor]:
    """One id per row and its largest logit, as `draw_ids` gives them."""
    tensors = row_params(params, counts, logits.shape[1], logits.device, allowed)
    return draw_ids(logits, tensors, uniforms_for(tensors, uniforms, logits.device), kernels)


def on_device(numbers: Seq[float] | Seq[Seq[float]], device: torch.device) -> Tensor:
    """As float64. `torch.tensor` takes three times as long."""
    return to_device(np.array(numbers, dtype=np.float64), device)


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


def logprobs_of(logits: Tensor, chosen: Seq[int], num_top: int) -> list[TokenLogprob]:
    """Log-probabilities of the chosen ids and of the `num_top` likeliest ones, likeliest first.

    logits (R, V) float32, as the model gave them; chosen: R ids.
    """
    ids = torch.tensor(chosen, dtype=torch.int64, device=logits.device)
    return scores_of(chosen, num_top, *read(*ranked(logits, ids, num_top)))


def ranked(logits: Tensor, chosen: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of the chosen ids (...) among logits (..., V), and the ids' ranks; the `num_top` likeliest ids
    (..., num_top), and theirs."""
    logprobs, chosen, vocab_size = logits.log_softmax(-1), chosen[..., None], logits.shape[-1]
    # None is positive, so their bits without the sign grow as they fall; equal ones rank by id. A sort takes longer.
    order = (logprobs.view(torch.int32) & 0x7FFFFFFF).long() << 32 | torch.arange(vocab_size, device=logits.device)
    ranks = 1 + (order < order.gather(-1, chosen)).sum(-1)
    top = order.topk(min(num_top, vocab_size), largest=False).values & 0xFFFFFFFF
    return logprobs.gather(-1, chosen)[..., 0], ranks, top, logprobs.gather(-1, top)


def scores_of(
    chosen: Seq[int], num_top: int, own: Seq[float], ranks: Seq[int], top: Seq[Seq[int]], values: Seq[Seq[float]]
) -> list[TokenLogprob]:
    """From what `ranked` gave for at least so many ids and as many of the likeliest."""
    return [
        TokenLogprob(id=i, logprob=value, top=dict(zip(ids[:num_top], tops[:num_top], strict=True)), rank=rank)
        for i, value, rank, ids, tops in zip(chosen, own, ranks, top, values, strict=False)
    ]


def are_distributions(highest: Iterable[float]) -> bool:
    """Whether no row has NaN, +inf, or nothing above -inf. highest: the largest logit of each, NaN if any is."""
    return all(map(isfinite, highest))


def biases(params: SamplingParams, vocab_size: int) -> dict[int, float]:
    """What a request adds to the logits of ids."""
    return {i: bias for i, bias in params.logit_bias.items() if 0 <= i < vocab_size}


def static_changes(params: SamplingParams, vocab_size: int) -> dict[int, float]:
    """What is added to the logits of each row by id, whatever the text is: bias, and -inf where an id is not allowed.
    An id outside the vocabulary has no effect."""
    change = biases(params, vocab_size)
    if params.allowed_ids:
        change |= dict.fromkeys(set(range(vocab_size)).difference(params.allowed_ids), -inf)
    return change


def _logit_changes(params: SamplingParams, counts: Mapping[int, int], vocab_size: int) -> dict[int, float]:
    """What is added to a row's logits by id, after the repetition penalty if there is one."""
    change = static_changes(unbiased(params), vocab_size)
    if params.presence_penalty or params.frequency_penalty:
        for i, count in counts.items():
            if count:
                change[i] = change.get(i, 0.0) - params.presence_penalty - params.frequency_penalty * count
    return change


def unbiased(params: SamplingParams) -> SamplingParams:
    """Without the bias, where the repetition penalty comes between."""
    return params if params.repetition_penalty == 1 else replace(params, logit_bias={})


def _repetition(params: Seq[SamplingParams], counts: Seq[Mapping[int, int]], vocab_size: int) -> NDArray[np.float64]:
    """(2, R, V): bias and factors. A row without this penalty gets 0 and 1, which change no bit of it."""
    repeated = np.zeros((2, len(params), vocab_size))
    repeated[1] = 1
    for row, (p, count) in enumerate(zip(params, counts, strict=True)):
        if p.repetition_penalty != 1:
            bias = biases(p, vocab_size)
            repeated[0, row, list(bias)] = list(bias.values())
            repeated[1, row, list(count)] = p.repetition_penalty
    return repeated
