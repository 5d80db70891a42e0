"""Max-pooling of byte states into patches."""

from typing import NamedTuple

import torch
from torch import Tensor

from .gate import gate_options
from .lang import await_inputs, blocks, jit, let_next_begin, power_of_two, tl
from .traffic import Traffic


class PageTable(NamedTuple):
    """The pages of some sequences in one cache.

    pages (S, P) int64: of each sequence, and zeros after them. first (S,) int64: the sequence's page number of the
    first of them.
    """

    pages: Tensor
    first: Tensor


def patch_max(cache: Tensor, table: PageTable, sequence: Tensor, begin: Tensor, after: Tensor) -> Tensor:
    """Elementwise maximum over the bytes of each patch: (N, dim).

    cache (pages, page_size, dim): byte states. sequence, begin, after (N,) int64: of each patch its sequence's row in
    `table`, its first position and the one after it. The result of a patch without bytes, which is padding, is zeros.
    """
    lengths = after - begin
    which = torch.repeat_interleave(torch.arange(len(begin), device=begin.device), lengths)
    within = torch.arange(len(which), device=begin.device) - (lengths.cumsum(0) - lengths)[which]
    position, row = begin[which] + within, sequence[which]
    page = table.pages[row, position // cache.shape[1] - table.first[row]]
    states = cache[page, position % cache.shape[1]].float()
    pooled = torch.segment_reduce(states, "max", lengths=lengths, axis=0)
    return pooled.where(lengths[:, None] > 0, 0.0).to(cache.dtype)


def traffic(patches: int, num_bytes: int, dim: int, itemsize: int) -> Traffic:
    """Bytes of `patch_max`: every byte state in, every patch out."""
    return Traffic(num_bytes * dim * itemsize, patches * dim * itemsize)


@jit(do_not_specialize_on_alignment=["pages_ptr", "first_ptr", "sequence_ptr", "begin_ptr", "after_ptr"])
def patch_max_kernel(
    cache_ptr, pages_ptr, first_ptr, sequence_ptr, begin_ptr, after_ptr, out_ptr, page_size, most_pages, gate_ptr,
    DIM: tl.constexpr, BLOCK: tl.constexpr, GATE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One patch, one block of dimensions."""
    let_next_begin(OVERLAP)
    await_inputs(OVERLAP)
    if GATE:
        if tl.load(gate_ptr) == 0:
            return
    patch = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin, after = tl.load(begin_ptr + patch), tl.load(after_ptr + patch)
    row = tl.load(sequence_ptr + patch)
    p_pages = pages_ptr + row * most_pages - tl.load(first_ptr + row)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for position in range(begin, after):
        at = (tl.load(p_pages + position // page_size) * page_size + position % page_size) * DIM
        x = tl.load(cache_ptr + at + i, mask=i < DIM, other=0.0).to(tl.float32)
        # A NaN in a state must not get lost: the request fails for it.
        highest = tl.maximum(highest, x, propagate_nan=tl.PropagateNan.ALL)
    highest = tl.where(after > begin, highest, 0.0)
    tl.store(out_ptr + patch * DIM + i, highest.to(out_ptr.dtype.element_ty), mask=i < DIM)


def patch_max_triton(cache: Tensor, table: PageTable, sequence: Tensor, begin: Tensor, after: Tensor) -> Tensor:
    """As `patch_max`."""
    patches, dim = len(begin), cache.shape[2]
    out = cache.new_empty(patches, dim)
    block = min(power_of_two(dim), 256)
    patch_max_kernel[(patches, blocks(dim, block))](
        cache, table.pages, table.first, sequence, begin, after, out, cache.shape[1], table.pages.shape[1],
        DIM=dim, BLOCK=block, num_warps=4, **gate_options(cache),
    )  # fmt: skip
    return out
