"""The decoder's cross-attention: every byte row reads the k slots of exactly one latent."""

from torch import Tensor

from .float8 import codes_of
from .lang import await_inputs, blocks, jit, let_next_begin, overlap, power_of_two, tl
from .linear import Matrix, linear, linear_triton
from .product import TRIGGER_FIRST, add_product, cut, hold, product_grid, product_options
from .traffic import Traffic


def read_slots(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page: Tensor, offset: Tensor, slots: int, o: Matrix, x: Tensor
) -> Tensor:  # fmt: skip
    """x + (x + Wo a), where a is what `slot_attention` gives: q (R, heads, head_dim), o (dim, heads * head_dim), x (R,
    dim) to (R, dim)."""
    seen = slot_attention(q, k_cache, v_cache, page, offset, slots)
    return linear(seen.flatten(1), o, residual=x, twice=True)


def slot_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page: Tensor, offset: Tensor, slots: int
) -> Tensor:  # fmt: skip
    """softmax(q k / sqrt(head_dim)) v over the slots of each row's own latent: q (R, heads, head_dim) in and out.

    The slots of row r's latent are rows offset[r] .. offset[r] + slots - 1 of cache page page[r]. Caches (pages,
    kv_heads, page_size, head_dim); heads is a multiple of kv_heads. Scores and softmax in float32. No mask and no
    positions.
    """
    rows = offset[:, None] + offset.new_tensor(range(slots))
    k, v = (cache[page[:, None], :, rows] for cache in (k_cache, v_cache))
    grouped = q.float().unflatten(1, (k.shape[2], -1)).unsqueeze(1)
    scores = (grouped * k.float().unsqueeze(3)).sum(-1, keepdim=True) * q.shape[-1] ** -0.5
    return (scores.softmax(1) * v.float().unsqueeze(3)).sum(1).flatten(1, 2).to(q.dtype)


def traffic(rows: int, slots: int, heads: int, kv_heads: int, head_dim: int, itemsize: int) -> Traffic:
    """Bytes of `slot_attention`: every row in and out, and its own latent's slots."""
    q = rows * heads * head_dim * itemsize
    return Traffic(q + rows * 2 * slots * kv_heads * head_dim * itemsize, q)


@jit
def attend(
    q_ptr, k_ptr, v_ptr, i_row, m_row, i_head, page, offset, heads, kv_heads, page_size, scale,
    SLOTS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Slot attention of rows `i_row` (R,) and heads `i_head` (H,): (R, H, BLOCK_DIM) float32, zeros beyond."""
    i_dim = tl.arange(0, BLOCK_DIM)
    m = m_row[:, None, None] & (i_head < heads)[None, :, None] & (i_dim < HEAD_DIM)[None, None, :]
    at = (i_row.to(tl.int64)[:, None] * heads + i_head[None, :])[:, :, None] * HEAD_DIM + i_dim[None, None, :]
    b_q = tl.load(q_ptr + at, mask=m, other=0.0).to(tl.float32)
    kv_head = i_head // (heads // kv_heads)
    at = ((page * kv_heads)[:, None] + kv_head[None, :]) * page_size + offset[:, None]
    at = at[:, :, None] * HEAD_DIM + i_dim[None, None, :]
    highest = tl.full((b_q.shape[0], b_q.shape[1]), float("-inf"), tl.float32)
    for slot in tl.static_range(SLOTS):
        b_k = tl.load(k_ptr + at + slot * HEAD_DIM, mask=m, other=0.0).to(tl.float32)
        highest = tl.maximum(highest, tl.sum(b_q * b_k, 2) * scale)
    total = tl.zeros((b_q.shape[0], b_q.shape[1]), tl.float32)
    out = tl.zeros(b_q.shape, tl.float32)
    for slot in tl.static_range(SLOTS):
        b_k = tl.load(k_ptr + at + slot * HEAD_DIM, mask=m, other=0.0).to(tl.float32)
        b_v = tl.load(v_ptr + at + slot * HEAD_DIM, mask=m, other=0.0).to(tl.float32)
        weight = tl.exp(tl.sum(b_q * b_k, 2) * scale - highest)
        total += weight
        out += weight[:, :, None] * b_v
    return out / total[:, :, None]


@jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["page_ptr", "offset_ptr"])
def read_slots_kernel(
    q_ptr, k_ptr, v_ptr, page_ptr, offset_ptr, w_ptr, scale_ptr, x_ptr, out_ptr,
    rows, out_dim, heads, kv_heads, page_size, scale,
    SLOTS: tl.constexpr, HEAD_DIM: tl.constexpr,
    IN: tl.constexpr, SEGMENTS: tl.constexpr, WIDTH: tl.constexpr, ROUNDS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One block of outputs, of some blocks of rows. Every program attends anew: a row reads a few kilobytes."""
    if TRIGGER_FIRST:
        let_next_begin(OVERLAP)
    i_out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    m_out = i_out < out_dim
    w, _, _ = hold(w_ptr, i_out, m_out, IN, SEGMENTS, WIDTH, ROUNDS)
    if scale_ptr is not None:
        w_scale = tl.load(scale_ptr + i_out, mask=m_out, other=0.0)
    await_inputs(OVERLAP)
    dtype = q_ptr.dtype.element_ty
    HEADS: tl.constexpr = SEGMENTS * WIDTH // HEAD_DIM
    for block in range(tl.program_id(0), (rows + ROWS - 1) // ROWS, tl.num_programs(0)):
        i_row = block * ROWS + tl.arange(0, ROWS)
        m_row = i_row < rows
        page = tl.load(page_ptr + i_row, mask=m_row, other=0)
        offset = tl.load(offset_ptr + i_row, mask=m_row, other=0)
        seen = attend(
            q_ptr, k_ptr, v_ptr, i_row, m_row, tl.arange(0, HEADS), page, offset, heads, kv_heads, page_size, scale,
            SLOTS, HEAD_DIM, HEAD_DIM,
        )  # fmt: skip
        seen = tl.permute(tl.reshape(seen.to(dtype), (ROWS, SEGMENTS, WIDTH)), (1, 0, 2))
        total = tl.sum(add_product(tl.zeros((SEGMENTS, ROWS, BLOCK_OUT), tl.float32), seen, w), 0)
        # Rounds where the twin rounds.
        if scale_ptr is not None:
            total = total.to(dtype).to(tl.float32) * w_scale[None, :]
        m_y = m_row[:, None] & m_out[None, :]
        p_y = i_row.to(tl.int64)[:, None] * out_dim + i_out[None, :]
        b_x = tl.load(x_ptr + p_y, mask=m_y, other=0.0).to(tl.float32)
        y = b_x + (b_x + total.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        tl.store(out_ptr + p_y, y.to(dtype), mask=m_y)
    if not TRIGGER_FIRST:
        let_next_begin(OVERLAP)


@jit(do_not_specialize_on_alignment=["page_ptr", "offset_ptr"])
def slot_attention_kernel(
    q_ptr, k_ptr, v_ptr, page_ptr, offset_ptr, out_ptr, heads, kv_heads, page_size, scale,
    SLOTS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row, one block of its heads."""
    let_next_begin(OVERLAP)
    await_inputs(OVERLAP)
    row = tl.program_id(0) + tl.arange(0, 1)
    i_head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    page, offset = tl.load(page_ptr + row), tl.load(offset_ptr + row)
    out = attend(
        q_ptr, k_ptr, v_ptr, row, row >= 0, i_head, page, offset, heads, kv_heads, page_size, scale,
        SLOTS, HEAD_DIM, BLOCK_DIM,
    )  # fmt: skip
    i_dim = tl.arange(0, BLOCK_DIM)
    m = (i_head < heads)[None, :, None] & (i_dim < HEAD_DIM)[None, None, :]
    at = (row.to(tl.int64)[:, None] * heads + i_head[None, :])[:, :, None] * HEAD_DIM + i_dim[None, None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=m)


def read_slots_triton(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page: Tensor, offset: Tensor, slots: int, o: Matrix, x: Tensor
) -> Tensor:  # fmt: skip
    """As `read_slots`. One kernel where heads fill the segments of the product, which whole heads then do."""
    rows, heads, head_dim = q.shape
    kv_heads, page_size = k_cache.shape[1:3]
    out_dim, width = o.data.shape
    places = q, k_cache, v_cache, page, offset
    sizes = heads, kv_heads, page_size, head_dim**-0.5
    if cut(width, q.dtype).rounds > 1 or head_dim & (head_dim - 1):
        seen = q.new_empty(rows, heads * head_dim)
        block = {"BLOCK_HEADS": min(power_of_two(heads), 8), "BLOCK_DIM": power_of_two(head_dim)}
        slot_attention_kernel[(rows, blocks(heads, block["BLOCK_HEADS"]))](
            *places, seen, *sizes, SLOTS=slots, HEAD_DIM=head_dim, **block, num_warps=4, **overlap(q)
        )
        return linear_triton(seen, o, residual=x, twice=True)
    out = q.new_empty(rows, out_dim)
    options = product_options(width, q.dtype, out_dim, o.data.itemsize)
    read_slots_kernel[product_grid(rows, out_dim, options)](
        *places,
        codes_of(o.data),
        o.scale,
        x,
        out,
        rows,
        out_dim,
        *sizes,
        SLOTS=slots,
        HEAD_DIM=head_dim,
        **options,
        **overlap(q),
    )
    return out
