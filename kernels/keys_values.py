"""Keys and values of cross-attentions: rows normalised, multiplied, and stored in pages, of several layers at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .float8 import codes_of
from .gate import gate_options
from .lang import await_inputs, jit, let_next_begin, tl
from .linear import linear
from .product import NORM_INSIDE, TRIGGER_FIRST, before_product, hold, multiply, product_grid, product_options
from .stack import CrossKvWeights, KvCache, KvPages


def keys_values(
    x: Tensor, weights: CrossKvWeights, cache: KvPages, page: Tensor, offset: Tensor, states: Tensor | None = None
) -> None:
    """Stores x (R, dim) as keys and values at page[r], offset[r] (R,) int64 of the cache, and in states (pages,
    page_size, dim), if there are any, as it is."""
    kv = linear(x, weights.kv, norm=weights.norm, eps=weights.eps).unflatten(1, (-1, weights.head_dim))
    for rows, pages in zip(kv.chunk(2, dim=1), cache, strict=True):
        pages[page, :, offset] = rows
    if states is not None:
        states[page, offset] = x


@jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["page_ptr", "offset_ptr"])
def keys_values_kernel(
    x_ptr, norm_ptr, w_ptr, scale_ptr, page_ptr, offset_ptr, k_ptr, v_ptr, states_ptr, layers_ptr,
    rows, kv_heads, page_size, eps, gate_ptr,
    HEAD_DIM: tl.constexpr, NORM: tl.constexpr,
    IN: tl.constexpr, SEGMENTS: tl.constexpr, WIDTH: tl.constexpr, ROUNDS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr, GATE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One block of outputs of one layer, of some blocks of rows. layers_ptr: for several layers, the addresses of each
    one's norm, weights, scale, keys and values; the arguments then tell their types."""
    if TRIGGER_FIRST:
        let_next_begin(OVERLAP)
    if layers_ptr is not None:
        p_layer = layers_ptr + tl.program_id(2) * 5
        norm_ptr = tl.multiple_of(tl.load(p_layer).to(norm_ptr.dtype), 16)
        w_ptr = tl.multiple_of(tl.load(p_layer + 1).to(w_ptr.dtype), 16)
        if scale_ptr is not None:
            scale_ptr = tl.load(p_layer + 2).to(scale_ptr.dtype)
        k_ptr = tl.load(p_layer + 3).to(k_ptr.dtype)
        v_ptr = tl.load(p_layer + 4).to(v_ptr.dtype)
    i_out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    m_out = i_out < 2 * kv_heads * HEAD_DIM
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
    is_key = i_head < kv_heads
    kv_head = i_head - tl.where(is_key, 0, kv_heads)
    for block in range(tl.program_id(0), (rows + ROWS - 1) // ROWS, tl.num_programs(0)):
        i_row = block * ROWS + tl.arange(0, ROWS)
        m_row = i_row < rows
        page = tl.load(page_ptr + i_row, mask=m_row, other=0)
        offset = tl.load(offset_ptr + i_row, mask=m_row, other=0)
        total = multiply(
            x_ptr, norm_ptr, w_ptr, w0, w1, w2, i_row.to(tl.int64), m_row, i_out, m_out, eps,
            IN, SEGMENTS, WIDTH, ROUNDS, ROWS, BLOCK_OUT, NORM,
        )  # fmt: skip
        # Rounds where the twin rounds.
        if scale_ptr is not None:
            total = total.to(dtype).to(tl.float32) * scale[None, :]
        y = total.to(dtype)
        at = ((page * kv_heads)[:, None] + kv_head[None, :]) * page_size + offset[:, None]
        at = at * HEAD_DIM + (i_out % HEAD_DIM)[None, :]
        tl.store(k_ptr + at, y, mask=m_row[:, None] & is_key[None, :])
        tl.store(v_ptr + at, y, mask=m_row[:, None] & (m_out & (i_head >= kv_heads))[None, :])
        if states_ptr is not None:
            p_states = states_ptr + (page * page_size + offset)[:, None] * IN
            for start in range(tl.program_id(1) * BLOCK_OUT, IN, tl.num_programs(1) * BLOCK_OUT):
                i_in = start + tl.arange(0, BLOCK_OUT)
                m = m_row[:, None] & (i_in < IN)[None, :]
                state = tl.load(x_ptr + i_row.to(tl.int64)[:, None] * IN + i_in[None, :], mask=m)
                tl.store(p_states + i_in[None, :], state, mask=m)
    if not TRIGGER_FIRST:
        let_next_begin(OVERLAP)


def keys_values_triton(
    x: Tensor, weights: CrossKvWeights, cache: KvPages, page: Tensor, offset: Tensor, states: Tensor | None = None
) -> None:
    """As `keys_values`, for contiguous operands."""
    x, norm = before_product(x, weights.norm, weights.eps)
    _launch(x, norm, weights, cache, page, offset, states, None, 1)


class CrossKvTriton:
    """As `kernels.stack.composed_cross_kv`, all layers in one launch."""

    def __init__(self, weights: Sequence[CrossKvWeights]) -> None:
        self._weights = weights
        self._layers: tuple[KvCache, Tensor] | None = None

    def __call__(self, x: Tensor, cache: KvCache, page: Tensor, offset: Tensor) -> None:
        if not NORM_INSIDE:
            for w, pages in zip(self._weights, cache, strict=True):
                keys_values_triton(x, w, pages, page, offset)
            return
        if self._layers is None or self._layers[0] is not cache:
            numbers = [
                [_address(t) for t in (w.norm, *w.kv, *pages)] for w, pages in zip(self._weights, cache, strict=True)
            ]
            self._layers = cache, torch.tensor(numbers, dtype=torch.int64, device=x.device)
        first = self._weights[0]
        _launch(x, first.norm, first, cache[0], page, offset, None, self._layers[1], len(cache))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _launch(
    x: Tensor, norm: Tensor | None, weights: CrossKvWeights, cache: KvPages, page: Tensor, offset: Tensor,
    states: Tensor | None, layers: Tensor | None, num_layers: int,
) -> None:  # fmt: skip
    data, scale = weights.kv
    out, width = data.shape
    kv_heads, page_size = cache[0].shape[1:3]
    options = product_options(width, x.dtype, out, data.itemsize)
    keys_values_kernel[(*product_grid(len(x), out, options), num_layers)](
        x, norm, codes_of(data), scale, page, offset, *cache, states, layers,
        len(x), kv_heads, page_size, weights.eps, HEAD_DIM=weights.head_dim, NORM=norm is not None,
        **options, **gate_options(x),
    )  # fmt: skip
