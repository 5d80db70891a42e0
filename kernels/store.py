"""Writes rows into paged caches: keys and values, rotated if they have positions, and byte states."""

from torch import Tensor

from .gate import gate_options
from .lang import await_inputs, blocks, jit, let_next_begin, overlap, power_of_two, tl
from .rope import apply_rope
from .traffic import Traffic


def store_qkv(
    qkv: Tensor, rope: Tensor, positions: Tensor, page: Tensor, offset: Tensor, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    """Splits qkv (R, heads + 2 kv_heads, head_dim), rotates queries and keys, stores K/V: returns q (R, heads, ...).

    rope as `rope_table` gives it; positions, page, offset (R,) int64; caches (pages, kv_heads, page_size, head_dim).
    """
    kv_heads = k_cache.shape[1]
    turned = apply_rope(qkv[:, :-kv_heads], rope.index_select(0, positions))
    k_cache[page, :, offset] = turned[:, -kv_heads:]
    v_cache[page, :, offset] = qkv[:, -kv_heads:]
    return turned[:, :-kv_heads]


def store_kv(kv: Tensor, page: Tensor, offset: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """Stores kv (R, 2 kv_heads, head_dim), keys first, as they are."""
    k, v = kv.chunk(2, dim=1)
    k_cache[page, :, offset] = k
    v_cache[page, :, offset] = v


def store_states(states: Tensor, page: Tensor, offset: Tensor, cache: Tensor) -> None:
    """Stores states (R, dim) into cache (pages, page_size, dim)."""
    cache[page, offset] = states


def traffic(rows: int, heads: int, kv_heads: int, head_dim: int, itemsize: int) -> Traffic:
    """Bytes of `store_qkv` (heads 0: of `store_kv`): every row in, its angles if it has queries, every row out."""
    row = (heads + 2 * kv_heads) * head_dim * itemsize
    return Traffic(rows * (row + (4 * head_dim if heads else 0)), rows * row)


# Triton.


@jit(do_not_specialize_on_alignment=["position_ptr", "page_ptr", "offset_ptr"])
def store_qkv_kernel(
    x_ptr, rope_ptr, position_ptr, page_ptr, offset_ptr, k_ptr, v_ptr, q_ptr,
    heads, kv_heads, page_size, gate_ptr,
    HEAD_DIM: tl.constexpr, ROTATE: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
    GATE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row, one block of its heads: queries, then keys, then values."""
    let_next_begin(OVERLAP)
    await_inputs(OVERLAP)
    if GATE:
        if tl.load(gate_ptr) == 0:
            return
    row = tl.program_id(0).to(tl.int64)
    i_head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    i_pair = tl.arange(0, BLOCK_PAIRS)
    m = (i_head < heads + 2 * kv_heads)[:, None] & (i_pair < HEAD_DIM // 2)[None, :]
    even_at = i_head[:, None] * HEAD_DIM + 2 * i_pair[None, :]
    p_x = x_ptr + row * (heads + 2 * kv_heads) * HEAD_DIM + even_at
    dtype = x_ptr.dtype.element_ty
    even = tl.load(p_x, mask=m, other=0.0).to(tl.float32)
    odd = tl.load(p_x + 1, mask=m, other=0.0).to(tl.float32)
    if ROTATE:
        p_angle = rope_ptr + tl.load(position_ptr + row) * HEAD_DIM + i_pair
        cos = tl.load(p_angle, mask=i_pair < HEAD_DIM // 2, other=0.0)[None, :]
        sin = tl.load(p_angle + HEAD_DIM // 2, mask=i_pair < HEAD_DIM // 2, other=0.0)[None, :]
        turns = (i_head < heads + kv_heads)[:, None]
        even, odd = tl.where(turns, even * cos - odd * sin, even), tl.where(turns, even * sin + odd * cos, odd)
    page, offset = tl.load(page_ptr + row), tl.load(offset_ptr + row)
    is_query = (i_head < heads)[:, None]
    is_key = ((i_head >= heads) & (i_head < heads + kv_heads))[:, None]
    is_value = (i_head >= heads + kv_heads)[:, None]
    tl.store(q_ptr + row * heads * HEAD_DIM + even_at, even.to(dtype), mask=m & is_query)
    tl.store(q_ptr + row * heads * HEAD_DIM + even_at + 1, odd.to(dtype), mask=m & is_query)
    kv_head = i_head - tl.where(i_head < heads + kv_heads, heads, heads + kv_heads)
    at = ((page * kv_heads + kv_head)[:, None] * page_size + offset) * HEAD_DIM + 2 * i_pair[None, :]
    tl.store(k_ptr + at, even.to(dtype), mask=m & is_key)
    tl.store(k_ptr + at + 1, odd.to(dtype), mask=m & is_key)
    tl.store(v_ptr + at, even.to(dtype), mask=m & is_value)
    tl.store(v_ptr + at + 1, odd.to(dtype), mask=m & is_value)


def store_qkv_triton(
    qkv: Tensor, rope: Tensor, positions: Tensor, page: Tensor, offset: Tensor, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    """As `store_qkv`."""
    rows, all_heads, head_dim = qkv.shape
    q = qkv.new_empty(rows, all_heads - 2 * k_cache.shape[1], head_dim)
    _launch(qkv, rope, positions, page, offset, k_cache, v_cache, q)
    return q


def store_kv_triton(kv: Tensor, page: Tensor, offset: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """As `store_kv`."""
    _launch(kv, None, None, page, offset, k_cache, v_cache, None)


def _launch(
    qkv: Tensor, rope: Tensor | None, positions: Tensor | None, page: Tensor, offset: Tensor,
    k_cache: Tensor, v_cache: Tensor, q: Tensor | None,
) -> None:  # fmt: skip
    rows, all_heads, head_dim = qkv.shape
    kv_heads, page_size = k_cache.shape[1:3]
    block = store_blocks(all_heads, head_dim)
    grid = (rows, blocks(all_heads, block["BLOCK_HEADS"]))
    # Without queries nothing is written there, but the kernel needs an address.
    store_qkv_kernel[grid](
        qkv, rope, positions, page, offset, k_cache, v_cache, qkv if q is None else q,
        all_heads - 2 * kv_heads, kv_heads, page_size,
        HEAD_DIM=head_dim, ROTATE=rope is not None, **block, num_warps=4, **gate_options(qkv),
    )  # fmt: skip


def store_blocks(all_heads: int, head_dim: int) -> dict[str, int]:
    return {"BLOCK_HEADS": min(power_of_two(all_heads), 16), "BLOCK_PAIRS": power_of_two(head_dim // 2)}


@jit(do_not_specialize_on_alignment=["page_ptr", "offset_ptr"])
def store_states_kernel(
    x_ptr, page_ptr, offset_ptr, cache_ptr, page_size, DIM: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_begin(OVERLAP)
    await_inputs(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = (tl.load(page_ptr + row) * page_size + tl.load(offset_ptr + row)) * DIM
    tl.store(cache_ptr + at + i, tl.load(x_ptr + row * DIM + i, mask=i < DIM, other=0.0), mask=i < DIM)


def store_states_triton(states: Tensor, page: Tensor, offset: Tensor, cache: Tensor) -> None:
    """As `store_states`."""
    rows, dim = states.shape
    block = min(power_of_two(dim), 1024)
    store_states_kernel[(rows, blocks(dim, block))](
        states,
        page,
        offset,
        cache,
        cache.shape[1],
        DIM=dim,
        BLOCK=block,
        num_warps=4,
        **overlap(states),
    )
