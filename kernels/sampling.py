"""Draws ids from logits, and finds how much of a draft agrees with them.

A row's result has the same bits alone and in any batch: probabilities become integers before they are summed, so that
the order of summation cannot matter.

Speculative decoding at temperatures above 0 usually accepts a drafted byte with probability min(1, p / q) and draws
another from the residual (rejection sampling). Here draft and model draw with the same random number instead, one per
place of the text, and a drafted byte is accepted if the model draws it too. Both keep the model's distribution; this
way the text itself is the one that the model alone would have drawn, whatever the draft.
"""

import torch
from torch import Tensor

from .lang import IN_INTERPRETER, await_inputs, jit, let_next_begin, overlap, power_of_two, tl
from .traffic import Traffic

MASS_SCALE = 2.0**52
"""Probabilities are counted in units of 1 / this; a row's sum still fits a float64 exactly."""
_SCALE = tl.constexpr(MASS_SCALE)


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The id of each row's largest logit (the lowest id if equal), (R,) int64, and that logit (NaN if any is), (R,).

    logits (R, V) float32.
    """
    highest, ids = logits.max(-1)
    return ids, highest


def sample(logits: Tensor, params: Tensor, uniforms: Tensor) -> Tensor:
    """One id per row, (R,) int64: temperature, top_k, top_p, min_p, then the inverse of the distribution function in id
    order at `uniforms`. Temperature 0 takes the largest logit. Equal logits rank by id, lower first.

    logits (R, V) float32 or float64; params (R, 4) float64: the four in that order, top_k V for none; uniforms (R,)
    float64.
    """
    logits = logits.double()
    temperature, top_k, top_p, min_p = params.unbind(1)
    highest = logits.amax(-1, keepdim=True)
    best = (logits == highest).to(torch.int8).argmax(-1)
    # The maximum goes first, so that no temperature, however small, overflows.
    scaled = (logits - highest) / temperature.where(temperature > 0, 1.0)[:, None]
    mass = (scaled.softmax(-1) * MASS_SCALE).long()
    if bool((top_k < logits.shape[1]).any() or (top_p < 1).any()):
        order = scaled.sort(dim=-1, descending=True, stable=True).indices
        rank = torch.arange(logits.shape[1], device=logits.device)
        ranked = mass.gather(1, order).where(rank < top_k[:, None], 0)
        before = ranked.cumsum(-1) - ranked
        in_top_p = before < top_p[:, None] * ranked.sum(-1, keepdim=True)
        # top_p 0 still keeps the most probable id.
        mass = torch.zeros_like(mass).scatter(1, order, ranked.where(in_top_p | (rank == 0), 0))
    mass = mass.where(mass >= min_p[:, None] * mass.amax(-1, keepdim=True), 0)
    cdf = mass.cumsum(-1)
    total = cdf[:, -1:]
    target = (uniforms[:, None] * total).long().minimum(total - 1)
    # Nothing can be drawn from NaN, but the result must be a valid id.
    drawn = (cdf <= target).sum(-1).clamp(max=logits.shape[1] - 1)
    return torch.where(temperature > 0, drawn, best)


def accepted(drafts: Tensor, drawn: Tensor, lengths: Tensor) -> Tensor:
    """The length of each draft's prefix that equals the drawn ids: (S,) int64 (Fast BLT, Verify).

    drafts, drawn (S, K) int64; lengths (S,) int64: the drafts' lengths.
    """
    place = torch.arange(drafts.shape[1], device=drafts.device)
    right = (drafts == drawn) & (place < lengths[:, None])
    return right.long().cumprod(-1).sum(-1)


def traffic(rows: int, vocab_size: int) -> Traffic:
    """Bytes of `sample`, in float32."""
    return Traffic(rows * (4 * vocab_size + 40), rows * 8)


# Triton.


@jit
def argmax_kernel(logits_ptr, ids_ptr, highest_ptr, vocab_size, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """One row."""
    let_next_begin(OVERLAP)
    await_inputs(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * vocab_size + i, mask=i < vocab_size, other=float("-inf"))
    bad = tl.max((x != x).to(tl.int32), 0) > 0
    highest = tl.max(tl.where(x != x, float("-inf"), x), 0)
    # A row of NaN has no largest logit, but the result must be a valid id.
    best = tl.minimum(tl.min(tl.where(x == highest, i, BLOCK), 0), vocab_size - 1)
    tl.store(ids_ptr + row, best.to(tl.int64))
    tl.store(highest_ptr + row, tl.where(bad, float("nan"), highest))


def argmax_triton(logits: Tensor) -> tuple[Tensor, Tensor]:
    """As `argmax`, except for the id of a row that has a NaN."""
    rows, vocab_size = logits.shape
    ids, highest = torch.empty(rows, dtype=torch.int64, device=logits.device), logits.new_empty(rows)
    argmax_kernel[(rows,)](
        logits, ids, highest, vocab_size, BLOCK=power_of_two(vocab_size), num_warps=4, **overlap(logits)
    )
    return ids, highest


@jit(do_not_specialize_on_alignment=["params_ptr", "uniforms_ptr"])
def sample_kernel(
    logits_ptr, params_ptr, uniforms_ptr, out_ptr, vocab_size,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row. Ranks come from comparing every pair of ids, CHUNK of them at a time: a vocabulary of bytes is small."""
    let_next_begin(OVERLAP)
    await_inputs(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    m = i < vocab_size
    x = tl.load(logits_ptr + row * vocab_size + i, mask=m, other=float("-inf")).to(tl.float64)
    temperature, top_k = tl.load(params_ptr + row * 4), tl.load(params_ptr + row * 4 + 1)
    top_p, min_p = tl.load(params_ptr + row * 4 + 2), tl.load(params_ptr + row * 4 + 3)
    uniform = tl.load(uniforms_ptr + row)
    highest = tl.max(x, 0)
    best = tl.min(tl.where((x == highest) & m, i, BLOCK), 0)
    e = tl.exp((x - highest) / tl.where(temperature > 0.0, temperature, 1.0))
    mass = (e / tl.sum(e, 0) * _SCALE).to(tl.int64)

    rank = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, BLOCK, CHUNK):
        j = start + tl.arange(0, CHUNK)
        other = tl.load(logits_ptr + row * vocab_size + j, mask=j < vocab_size, other=float("-inf")).to(tl.float64)
        ahead = (other[None, :] > x[:, None]) | ((other[None, :] == x[:, None]) & (j[None, :] < i[:, None]))
        rank += tl.sum(ahead.to(tl.int32), 1)
    kept = tl.where(rank < top_k, mass, 0)
    # The mass ranked before each id: the same pairs again, now with masses, which programs cannot share.
    before = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, BLOCK, CHUNK):
        j = start + tl.arange(0, CHUNK)
        other = tl.load(logits_ptr + row * vocab_size + j, mask=j < vocab_size, other=float("-inf")).to(tl.float64)
        e_other = tl.exp((other - highest) / tl.where(temperature > 0.0, temperature, 1.0))
        mass_other = (e_other / tl.sum(e, 0) * _SCALE).to(tl.int64)
        ahead = (other[None, :] > x[:, None]) | ((other[None, :] == x[:, None]) & (j[None, :] < i[:, None]))
        before += tl.sum(tl.where(ahead, mass_other[None, :], 0), 1)
    in_top_p = before.to(tl.float64) < top_p * tl.sum(kept, 0).to(tl.float64)
    mass = tl.where((in_top_p & (rank < top_k)) | (rank == 0), mass, 0)
    mass = tl.where(mass.to(tl.float64) >= min_p * tl.max(mass, 0).to(tl.float64), mass, 0)
    cdf = tl.cumsum(mass, 0)
    total = tl.sum(mass, 0)
    target = tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)
    drawn = tl.sum(((cdf <= target) & m).to(tl.int64), 0)
    # Nothing can be drawn from NaN, but the result must be a valid id.
    found = tl.where(temperature > 0.0, drawn, best.to(tl.int64))
    tl.store(out_ptr + row, tl.minimum(found, vocab_size - 1))


def sample_triton(logits: Tensor, params: Tensor, uniforms: Tensor) -> Tensor:
    """As `sample`."""
    rows, vocab_size = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    block = power_of_two(vocab_size)
    sample_kernel[(rows,)](
        logits, params, uniforms, out, vocab_size,
        BLOCK=block, CHUNK=min(block, 128 if IN_INTERPRETER else 8), num_warps=8, **overlap(logits),
    )  # fmt: skip
    return out


@jit(do_not_specialize_on_alignment=["drafts_ptr", "drawn_ptr", "lengths_ptr"])
def accepted_kernel(drafts_ptr, drawn_ptr, lengths_ptr, out_ptr, width, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """One draft."""
    let_next_begin(OVERLAP)
    await_inputs(OVERLAP)
    s = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    m = i < tl.load(lengths_ptr + s)
    wrong = tl.load(drafts_ptr + s * width + i, mask=m & (i < width), other=-1) != tl.load(
        drawn_ptr + s * width + i, mask=m & (i < width), other=-2
    )
    tl.store(out_ptr + s, tl.min(tl.where(wrong | (i >= width), i, BLOCK), 0).to(tl.int64))


def accepted_triton(drafts: Tensor, drawn: Tensor, lengths: Tensor) -> Tensor:
    """As `accepted`."""
    num, width = drafts.shape
    out = torch.empty(num, dtype=torch.int64, device=drafts.device)
    # One column more than a draft can have, for its end.
    accepted_kernel[(num,)](
        drafts, drawn, lengths, out, width, BLOCK=power_of_two(width + 1), num_warps=1, **overlap(drafts)
    )
    return out
