"""Queries, keys and values of self-attention: the norm, the product, the rotation, and keys and values into their
pages."""

from torch import Tensor

from .float8 import codes_of
from .gate import gate_options
from .lang import await_inputs, jit, let_next_begin, tl
from .linear import Matrix, linear
from .product import TRIGGER_FIRST, before_product, hold, multiply, product_grid, product_options
from .rope import apply_rope


def qkv(
    x: Tensor, weight: Matrix, norm: Tensor, eps: float, rope: Tensor,
    positions: Tensor, page: Tensor, offset: Tensor, k_cache: Tensor, v_cache: Tensor,
) -> Tensor:  # fmt: skip
    """x (R, dim) through RMS normalisation with `norm`, times weight ((heads + 2 kv_heads) * head_dim, dim): queries,
    keys, values. Rotates queries and keys, stores keys and values, and returns q (R, heads, head_dim).

    rope as `rope_table` gives it; positions, page, offset (R,) int64; caches (pages, kv_heads, page_size, head_dim).
    """
    kv_heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    all_heads = linear(x, weight, norm=norm, eps=eps).unflatten(1, (-1, head_dim))
    turned = apply_rope(all_heads[:, :-kv_heads], rope.index_select(0, positions))
    k_cache[page, :, offset] = turned[:, -kv_heads:]
    v_cache[page, :, offset] = all_heads[:, -kv_heads:]
    return turned[:, :-kv_heads]


@jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["position_ptr", "page_ptr", "offset_ptr"])
def qkv_kernel(
    x_ptr, norm_ptr, w_ptr, scale_ptr, rope_ptr, position_ptr, page_ptr, offset_ptr, k_ptr, v_ptr, q_ptr,
    rows, heads, kv_heads, page_size, eps, gate_ptr,
    HEAD_DIM: tl.constexpr, NORM: tl.constexpr,
    IN: tl.constexpr, SEGMENTS: tl.constexpr, WIDTH: tl.constexpr, ROUNDS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr, GATE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One block of outputs, whole pairs that are rotated together, of some blocks of rows."""
    if TRIGGER_FIRST:
        let_next_begin(OVERLAP)
    i_out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    m_out = i_out < (heads + 2 * kv_heads) * HEAD_DIM
    if GATE:
        await_inputs(OVERLAP)
        if tl.load(gate_ptr) == 0:
            return
    w0, w1, w2 = hold(w_ptr, i_out, m_out, IN, SEGMENTS, WIDTH, ROUNDS)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + i_out, mask=m_out, other=0.0)
    if not GATE:
        await_inputs(OVERLAP)

    dtype = x_ptr.dtype.element_ty
    i_head = i_out // HEAD_DIM
    is_query = i_head < heads
    is_key = (i_head >= heads) & (i_head < heads + kv_heads)
    is_value = m_out & (i_head >= heads + kv_heads)
    kv_head = i_head - tl.where(is_key, heads, heads + kv_heads)
    i_pair = tl.program_id(1) * (BLOCK_OUT // 2) + tl.arange(0, BLOCK_OUT // 2)
    turns = i_pair // (HEAD_DIM // 2) < heads + kv_heads
    for block in range(tl.program_id(0), (rows + ROWS - 1) // ROWS, tl.num_programs(0)):
        i_row = block * ROWS + tl.arange(0, ROWS)
        m_row = i_row < rows
        # Asked for before the product, which they do not need.
        p_angle = rope_ptr + tl.load(position_ptr + i_row, mask=m_row, other=0)[:, None] * HEAD_DIM
        p_angle += i_pair[None, :] % (HEAD_DIM // 2)
        cos = tl.load(p_angle, mask=m_row[:, None] & turns[None, :], other=1.0)
        sin = tl.load(p_angle + HEAD_DIM // 2, mask=m_row[:, None] & turns[None, :], other=0.0)
        total = multiply(
            x_ptr, norm_ptr, w_ptr, w0, w1, w2, i_row.to(tl.int64), m_row, i_out, m_out, eps,
            IN, SEGMENTS, WIDTH, ROUNDS, ROWS, BLOCK_OUT, NORM,
        )  # fmt: skip
        # Rounds where the twin rounds.
        if scale_ptr is not None:
            total = total.to(dtype).to(tl.float32) * scale[None, :]
        page = tl.load(page_ptr + i_row, mask=m_row, other=0)
        offset = tl.load(offset_ptr + i_row, mask=m_row, other=0)
        even, odd = tl.split(tl.reshape(total.to(dtype).to(tl.float32), (ROWS, BLOCK_OUT // 2, 2)))
        turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
        y = tl.reshape(turned, (ROWS, BLOCK_OUT)).to(dtype)
        p_q = q_ptr + i_row.to(tl.int64)[:, None] * (heads * HEAD_DIM) + i_out[None, :]
        tl.store(p_q, y, mask=m_row[:, None] & is_query[None, :])
        at = ((page * kv_heads)[:, None] + kv_head[None, :]) * page_size + offset[:, None]
        at = at * HEAD_DIM + (i_out % HEAD_DIM)[None, :]
        tl.store(k_ptr + at, y, mask=m_row[:, None] & is_key[None, :])
        tl.store(v_ptr + at, y, mask=m_row[:, None] & is_value[None, :])
    if not TRIGGER_FIRST:
        let_next_begin(OVERLAP)


def qkv_triton(
    x: Tensor, weight: Matrix, norm: Tensor, eps: float, rope: Tensor,
    positions: Tensor, page: Tensor, offset: Tensor, k_cache: Tensor, v_cache: Tensor,
) -> Tensor:  # fmt: skip
    """As `qkv`, for contiguous operands."""
    out, width = weight.data.shape
    kv_heads, page_size, head_dim = k_cache.shape[1:]
    q = x.new_empty(len(x), out // head_dim - 2 * kv_heads, head_dim)
    x, left = before_product(x, norm, eps)
    options = product_options(width, x.dtype, out, weight.data.itemsize)
    qkv_kernel[product_grid(len(x), out, options)](
        x, left, codes_of(weight.data), weight.scale, rope, positions, page, offset, k_cache, v_cache, q,
        len(x), q.shape[1], kv_heads, page_size, eps, HEAD_DIM=head_dim, NORM=left is not None,
        **options, **gate_options(x),
    )  # fmt: skip
    return q
