"""The decoder's cross-attention: every byte row reads the k slots of exactly one latent."""

from torch import Tensor

from .lang import await_inputs, blocks, jit, let_next_begin, overlap, power_of_two, tl
from .traffic import Traffic


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


@jit(do_not_specialize_on_alignment=["page_ptr", "offset_ptr"])
def slot_attention_kernel(
    q_ptr, k_ptr, v_ptr, page_ptr, offset_ptr, out_ptr, heads, kv_heads, page_size, scale,
    SLOTS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row, one block of its heads."""
    let_next_begin(OVERLAP)
    await_inputs(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    i_head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    i_dim = tl.arange(0, BLOCK_DIM)
    m = (i_head < heads)[:, None] & (i_dim < HEAD_DIM)[None, :]
    at = row * heads * HEAD_DIM + i_head[:, None] * HEAD_DIM + i_dim[None, :]
    b_q = tl.load(q_ptr + at, mask=m, other=0.0)
    kv_head = i_head // (heads // kv_heads)
    page, offset = tl.load(page_ptr + row), tl.load(offset_ptr + row)
    p_kv = ((page * kv_heads + kv_head)[:, None] * page_size + offset) * HEAD_DIM + i_dim[None, :]
    highest = tl.full((BLOCK_HEADS,), float("-inf"), tl.float32)
    for slot in range(SLOTS):
        b_k = tl.load(k_ptr + p_kv + slot * HEAD_DIM, mask=m, other=0.0).to(tl.float32)
        highest = tl.maximum(highest, tl.sum(b_q.to(tl.float32) * b_k, 1) * scale)
    total = tl.zeros((BLOCK_HEADS,), tl.float32)
    out = tl.zeros((BLOCK_HEADS, BLOCK_DIM), tl.float32)
    for slot in range(SLOTS):
        b_k = tl.load(k_ptr + p_kv + slot * HEAD_DIM, mask=m, other=0.0).to(tl.float32)
        b_v = tl.load(v_ptr + p_kv + slot * HEAD_DIM, mask=m, other=0.0).to(tl.float32)
        weight = tl.exp(tl.sum(b_q.to(tl.float32) * b_k, 1) * scale - highest)
        total += weight
        out += weight[:, None] * b_v
    tl.store(out_ptr + at, (out / total[:, None]).to(b_q.dtype), mask=m)


def slot_attention_triton(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, page: Tensor, offset: Tensor, slots: int
) -> Tensor:  # fmt: skip
    """As `slot_attention`."""
    rows, heads, head_dim = q.shape
    kv_heads, page_size = k_cache.shape[1:3]
    out = q.new_empty(q.shape)
    block = slot_blocks(heads, head_dim)
    slot_attention_kernel[(rows, blocks(heads, block["BLOCK_HEADS"]))](
        q, k_cache, v_cache, page, offset, out, heads, kv_heads, page_size, head_dim**-0.5,
        SLOTS=slots, **block, num_warps=4, **overlap(q),
    )  # fmt: skip
    return out


def slot_blocks(heads: int, head_dim: int) -> dict[str, int]:
    return {"HEAD_DIM": head_dim, "BLOCK_HEADS": min(power_of_two(heads), 8), "BLOCK_DIM": power_of_two(head_dim)}
