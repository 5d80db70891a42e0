"""Chooses the cells of a block that become bytes after a pass, by the model's confidence (Fast BLT 3.1.2)."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .lang import await_inputs, jit, let_next_begin, overlap, power_of_two, tl
from .traffic import Traffic

if TYPE_CHECKING:
    from .dispatch import Kernels

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


class Blocks(NamedTuple):
    """Blocks of cells: (S,) each. begin, size, place int64: the first of a block's cells among all that are laid end to
    end, their number, and the place of the first in the text; rules int64 and bounds float64 as `unmask` takes them."""

    begin: Tensor
    size: Tensor
    place: Tensor
    rules: Tensor
    bounds: Tensor


def composed_settle(
    k: "Kernels", cells: Tensor, text_ids: Tensor, logits: Tensor, drawn: Tensor, blocks: Blocks, number: int, mask: int
) -> None:
    """Ends pass `number` over some blocks. cells (3, S, B) int64: ids as in the text, the pass that settled each (-1:
    none), and whether its logits were no distribution; pass 0 fills them. `unmask` chooses masked cells, which
    take the ids that were drawn, here and in the text. Cells beyond a block's size are undefined.

    text_ids: of `kernels.text.Text`; logits (C, V) float32 and drawn (C,) int64: of all cells, end to end; mask: the id
    of [MASK].
    """
    place = torch.arange(cells.shape[2], device=cells.device)
    inside = place < blocks.size[:, None]
    at = (blocks.place[:, None] + place)[inside]
    if number == 0:
        cells[0] = mask + 1
        cells[0, inside], cells[1], cells[2] = text_ids[at], -1, 0
    ids, when, bad = cells

    def grid(of_cells: Tensor) -> Tensor:
        spread = of_cells.new_zeros(inside.shape)
        spread[inside] = of_cells[(blocks.begin[:, None] + place)[inside]]
        return spread

    masked = inside & (ids == mask)
    confidence, entropy = map(grid, k.confidence_and_entropy(logits))
    settled = k.unmask(masked, confidence, entropy, blocks.rules, blocks.bounds)
    bad |= masked & ~grid(logits.amax(-1)).isfinite()
    ids[settled], when[settled] = grid(drawn)[settled], number
    text_ids[at] = ids[inside]


def traffic(num_blocks: int, size: int, vocab_size: int) -> Traffic:
    """Bytes of `settle`."""
    cells = num_blocks * size
    return Traffic(cells * (4 * vocab_size + 9), cells * 9)


# Triton.

_ONE_STEP, _CONFIDENCE, _ENTROPY_MINUS_MAX = map(tl.constexpr, (ONE_STEP, CONFIDENCE, ENTROPY_MINUS_MAX))


@jit
def _chosen(masked, confidence, entropy, rule, bound, size, BLOCK: tl.constexpr):
    """As `unmask`, of one block: (BLOCK,)."""
    i = tl.arange(0, BLOCK)
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
        counted = tl.where(rule == _ENTROPY_MINUS_MAX, total, total + own)
        going = going & (counted <= bound)
        by_entropy = by_entropy | (cell & going)
        total += own
        left = left & (~cell)
    none = tl.sum(by_entropy.to(tl.int32), 0) == 0
    by_entropy = by_entropy | (masked & none & (i == tl.argmin(tl.where(masked, entropy, float("inf")), 0)))

    return tl.where(rule == _ONE_STEP, masked, tl.where(rule == _CONFIDENCE, by_confidence, by_entropy)) != 0


@jit(
    do_not_specialize=["number"],
    do_not_specialize_on_alignment=["drawn_ptr", "begin_ptr", "size_ptr", "place_ptr", "rules_ptr", "bounds_ptr"],
)
def settle_kernel(
    cells_ptr, ids_ptr, logits_ptr, drawn_ptr, begin_ptr, size_ptr, place_ptr, rules_ptr, bounds_ptr,
    num_blocks, width, vocab_size, number, mask,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, VOCABULARY: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One block, CHUNK cells' logits at a time."""
    let_next_begin(OVERLAP)
    await_inputs(OVERLAP)
    block = tl.program_id(0)
    begin, size = tl.load(begin_ptr + block), tl.load(size_ptr + block)
    p_ids = ids_ptr + tl.load(place_ptr + block)
    i = tl.arange(0, BLOCK)
    m = i < size
    p_cells = cells_ptr + block * width + i
    ids = tl.load(p_ids + i, mask=m, other=0)
    masked = m & (ids == mask)

    confidence = tl.zeros((BLOCK,), tl.float32)
    entropy = tl.zeros((BLOCK,), tl.float32)
    bad = tl.zeros((BLOCK,), tl.int64)
    v = tl.arange(0, VOCABULARY)
    for start in range(0, size, CHUNK):
        j = start + tl.arange(0, CHUNK)
        p_logits = logits_ptr + (begin + j)[:, None] * vocab_size + v[None, :]
        inside = (j < size)[:, None] & (v < vocab_size)[None, :]
        x = tl.load(p_logits, mask=inside, other=float("-inf"))
        highest = tl.max(tl.where(x != x, float("inf"), x), 1)
        fine = (highest > float("-inf")) & (highest < float("inf"))
        # The figures of a row that is no distribution are not used.
        e = tl.exp(tl.where(fine[:, None], x - tl.where(fine, highest, 0.0)[:, None], 0.0))
        p = e / tl.sum(e, 1)[:, None]
        own = tl.sum(tl.where(p > 0.0, -p * tl.log(tl.where(p > 0.0, p, 1.0)), 0.0), 1)
        is_cell = i[:, None] == j[None, :]
        confidence += tl.sum(tl.where(is_cell, tl.max(p, 1)[None, :], 0.0), 1)
        entropy += tl.sum(tl.where(is_cell, own[None, :], 0.0), 1)
        bad += tl.sum((is_cell & (~fine)[None, :]).to(tl.int64), 1)

    chosen = _chosen(
        masked, confidence, entropy, tl.load(rules_ptr + block), tl.load(bounds_ptr + block), size, BLOCK
    )  # fmt: skip
    ids = tl.where(chosen, tl.load(drawn_ptr + begin + i, mask=m, other=0), ids)
    when = tl.full((BLOCK,), -1, tl.int64)
    was_bad = tl.zeros((BLOCK,), tl.int64)
    if number > 0:
        when = tl.load(p_cells + num_blocks * width, mask=m, other=0)
        was_bad = tl.load(p_cells + 2 * num_blocks * width, mask=m, other=0)
    tl.store(p_cells, ids, mask=m)
    tl.store(p_cells + num_blocks * width, tl.where(chosen, number, when), mask=m)
    tl.store(p_cells + 2 * num_blocks * width, was_bad | (masked & (bad > 0)).to(tl.int64), mask=m)
    tl.store(p_ids + i, ids, mask=m & chosen)


def settle_triton(
    cells: Tensor, text_ids: Tensor, logits: Tensor, drawn: Tensor, blocks: Blocks, number: int, mask: int
) -> None:
    """As `composed_settle`."""
    _, num_blocks, width = cells.shape
    vocab_size = logits.shape[1]
    settle_kernel[(num_blocks,)](
        cells, text_ids, logits, drawn, *blocks, num_blocks, width, vocab_size, number, mask,
        BLOCK=power_of_two(width), CHUNK=8, VOCABULARY=power_of_two(vocab_size), num_warps=4, **overlap(logits),
    )  # fmt: skip
