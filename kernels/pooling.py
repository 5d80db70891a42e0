"""Max-pooling of byte states into patches."""

import torch
from torch import Tensor

from .lang import await_inputs, blocks, jit, let_next_begin, overlap, power_of_two, tl
from .traffic import Traffic


def patch_max(cache: Tensor, page: Tensor, offset: Tensor, bounds: Tensor) -> Tensor:
    """Elementwise maximum over the bytes of each patch: (P, dim).

    cache (pages, page_size, dim): byte states; page, offset (N,) int64: where the patches' bytes lie, patch after
    patch; bounds (P + 1,) int64: patch p has bytes bounds[p] .. bounds[p + 1] - 1 of them. The result of a patch
    without bytes, which is padding, is zeros.
    """
    states = cache[page, offset].float()[: int(bounds[-1])]
    pooled = torch.segment_reduce(states, "max", lengths=bounds.diff(), axis=0)
    return pooled.where(bounds.diff()[:, None] > 0, 0.0).to(cache.dtype)


def traffic(patches: int, num_bytes: int, dim: int, itemsize: int) -> Traffic:
    """Bytes of `patch_max`: every byte state in, every patch out."""
    return Traffic(num_bytes * dim * itemsize, patches * dim * itemsize)


@jit(do_not_specialize_on_alignment=["page_ptr", "offset_ptr", "bounds_ptr"])
def patch_max_kernel(
    cache_ptr, page_ptr, offset_ptr, bounds_ptr, out_ptr, page_size, DIM: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One patch, one block of dimensions."""
    let_next_begin(OVERLAP)
    await_inputs(OVERLAP)
    patch = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin, end = tl.load(bounds_ptr + patch), tl.load(bounds_ptr + patch + 1)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for byte in range(begin, end):
        at = (tl.load(page_ptr + byte) * page_size + tl.load(offset_ptr + byte)) * DIM
        highest = tl.maximum(highest, tl.load(cache_ptr + at + i, mask=i < DIM, other=0.0).to(tl.float32))
    highest = tl.where(end > begin, highest, 0.0)
    tl.store(out_ptr + patch * DIM + i, highest.to(out_ptr.dtype.element_ty), mask=i < DIM)


def patch_max_triton(cache: Tensor, page: Tensor, offset: Tensor, bounds: Tensor) -> Tensor:
    """As `patch_max`."""
    patches, dim = len(bounds) - 1, cache.shape[2]
    out = cache.new_empty(patches, dim)
    block = min(power_of_two(dim), 256)
    patch_max_kernel[(patches, blocks(dim, block))](
        cache,
        page,
        offset,
        bounds,
        out,
        cache.shape[1],
        DIM=dim,
        BLOCK=block,
        num_warps=4,
        **overlap(cache),
    )
    return out
