"""Chooses the cells of a block that become bytes after a pass, by the model's confidence (Fast BLT 3.1.2)."""

import torch
from torch import Tensor

from .lang import await_inputs, jit, let_next_begin, overlap, power_of_two, tl
from .traffic import Traffic

ONE_STEP, CONFIDENCE, ENTROPY, ENTROPY_MINUS_MAX = range(4)
"""Rules, as numbers."""


def confidence_and_entropy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Highest probability and entropy (nats) of softmax(logits): (R, V) float32 in, twice (R,) float32 out.

    Ids with a logit of -inf are ignored.
    """
    p = logits.softmax(-1)
    return p.amax(-1), torch.special.entr(p).sum(-1)


def unmask(masked: Tensor, confidence: Tensor, entropy: Tensor, rules: Tensor, bounds: Tensor) -> Tensor:
    """The cells settled by this pass: (S, B) bool; at least one in every block with masked cells, ties to the left.

    masked (S, B) bool; confidence, entropy (S, B) float32; rules (S,) int64 as above; bounds (S,) float64.

    CONFIDENCE: all whose confidence is above the bound; if there are none, the most confident one. ENTROPY: from the
    lowest entropy up, as long as the sum is at most the bound; at least the lowest. ENTROPY_MINUS_MAX: the largest
    entropy of the sum is not counted (Ben-Hamu et al. 2025), so that one is always admitted. ONE_STEP: all.
    """
    settled = torch.zeros_like(masked)
    for s, (rule, bound) in enumerate(zip(rules.tolist(), bounds.tolist(), strict=True)):
        cells = masked[s].nonzero()[:, 0].tolist()
        settled[s, _settled(cells, confidence[s].tolist(), entropy[s].tolist(), rule, bound)] = True
    return settled


def _settled(cells: list[int], confidence: list[float], entropy: list[float], rule: int, bound: float) -> list[int]:
    if rule == ONE_STEP or not cells:
        return cells
    if rule == CONFIDENCE:
        above = [cell for cell in cells if confidence[cell] > bound]
        return above or [max(cells, key=lambda cell: confidence[cell])]
    admitted: list[int] = []
    total = 0.0
    for cell in sorted(cells, key=lambda cell: entropy[cell]):
        # Ascending, so the current one is the largest so far.
        if (total if rule == ENTROPY_MINUS_MAX else total + entropy[cell]) > bound:
            break
        total += entropy[cell]
        admitted.append(cell)
    return admitted or [min(cells, key=lambda cell: entropy[cell])]


def traffic(num_blocks: int, size: int, vocab_size: int) -> Traffic:
    """Bytes of `confidence_and_entropy` and `unmask`."""
    cells = num_blocks * size
    return Traffic(cells * (4 * vocab_size + 9), cells * 9)


# Triton.


@jit
def confidence_and_entropy_kernel(
    logits_ptr, confidence_ptr, entropy_ptr, vocab_size, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    """One row."""
    let_next_begin(OVERLAP)
    await_inputs(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * vocab_size + i, mask=i < vocab_size, other=float("-inf"))
    e = tl.exp(x - tl.max(x, 0))
    p = e / tl.sum(e, 0)
    tl.store(confidence_ptr + row, tl.max(p, 0))
    tl.store(entropy_ptr + row, tl.sum(tl.where(p > 0.0, -p * tl.log(tl.where(p > 0.0, p, 1.0)), 0.0), 0))


def confidence_and_entropy_triton(logits: Tensor) -> tuple[Tensor, Tensor]:
    """As `confidence_and_entropy`."""
    rows, vocab_size = logits.shape
    confidence, entropy = logits.new_empty(rows), logits.new_empty(rows)
    confidence_and_entropy_kernel[(rows,)](
        logits, confidence, entropy, vocab_size, BLOCK=power_of_two(vocab_size), num_warps=4, **overlap(logits)
    )
    return confidence, entropy


@jit(do_not_specialize_on_alignment=["masked_ptr", "confidence_ptr", "entropy_ptr", "rules_ptr", "bounds_ptr"])
def unmask_kernel(
    masked_ptr, confidence_ptr, entropy_ptr, rules_ptr, bounds_ptr, settled_ptr, size,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One block of cells."""
    let_next_begin(OVERLAP)
    await_inputs(OVERLAP)
    block = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    m = i < size
    masked = (tl.load(masked_ptr + block * size + i, mask=m, other=0) != 0) & m
    confidence = tl.load(confidence_ptr + block * size + i, mask=m, other=0.0)
    entropy = tl.load(entropy_ptr + block * size + i, mask=m, other=0.0)
    rule, bound = tl.load(rules_ptr + block), tl.load(bounds_ptr + block)

    surest = tl.where(masked, confidence, float("-inf"))
    above = masked & (confidence.to(tl.float64) > bound)
    by_confidence = above | (masked & (i == tl.argmax(surest, 0)) & (tl.sum(above.to(tl.int32), 0) == 0))

    # In order of cells, so that the sum has the twin's bits.
    left = masked
    by_entropy = i < 0
    total = tl.zeros((), tl.float64)
    going = True
    for _ in range(size):
        lowest = tl.where(left, entropy, float("inf"))
        cell = left & (i == tl.argmin(lowest, 0))
        own = tl.sum(tl.where(cell, entropy, 0.0).to(tl.float64), 0)
        counted = tl.where(rule == 3, total, total + own)
        going = going & (counted <= bound)
        by_entropy = by_entropy | (cell & going)
        total += own
        left = left & (~cell)
    none = tl.sum(by_entropy.to(tl.int32), 0) == 0
    by_entropy = by_entropy | (masked & none & (i == tl.argmin(tl.where(masked, entropy, float("inf")), 0)))

    settled = tl.where(rule == 0, masked, tl.where(rule == 1, by_confidence, by_entropy))
    tl.store(settled_ptr + block * size + i, settled, mask=m)


def unmask_triton(masked: Tensor, confidence: Tensor, entropy: Tensor, rules: Tensor, bounds: Tensor) -> Tensor:
    """As `unmask`."""
    num_blocks, size = masked.shape
    settled = torch.empty_like(masked)
    unmask_kernel[(num_blocks,)](
        masked,
        confidence,
        entropy,
        rules,
        bounds,
        settled,
        size,
        BLOCK=power_of_two(size),
        num_warps=1,
        **overlap(masked),
    )
    return settled
