"""Row-invariant matrix products, with the operations before and after them.

A GEMM library picks its inner kernel by the number of rows, and with it the order of summation: one row and nine rows
of the same input can differ in the last bit. Above some small count the choice no longer changes. `row_floor` measures
that count, so that the engine can pad every call up to it.

The Triton kernel sums as `kernels.product` says, whatever the number of rows.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .float8 import codes_of
from .gate import gate_options
from .lang import await_inputs, jit, let_next_begin, tl
from .norm import rms_norm
from .product import TRIGGER_FIRST, before_product, hold, multiply, product_grid, product_options
from .swiglu import swiglu
from .traffic import Traffic

_PROBED_ROWS = (*range(1, 18), 23, 24, 31, 32, 33, 48, 63, 64, 65, 128)
_PROBED_BATCHES = (2, 3, 4, 7, 16, 64)
FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0


class Matrix(NamedTuple):
    """A weight matrix: data (out, in), and for float8 data a scale (out,) float32 that multiplies each output."""

    data: Tensor
    scale: Tensor | None = None


def quantize(weight: Tensor) -> Matrix:
    """Rounds weight (out, in) to float8 (e4m3), each row scaled so that its largest element is the largest number."""
    scale = weight.float().abs().amax(1).clamp_min(1e-12) / _FP8_MAX
    return Matrix((weight.float() / scale[:, None]).to(FP8), scale)


def linear(
    x: Tensor,
    weight: Matrix,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: Tensor | None = None,
    twice: bool = False,
    rows: Tensor | None = None,
    wide: bool = False,
) -> Tensor:
    """x (R, in) times weight (out, in) transposed, in x's dtype.

    norm (in,): x goes through RMS normalisation with it first. gated: the first half of the outputs gates the second,
    silu(first) * second, (R, out / 2). residual: added to the result; `twice`: residual + (residual + result).
    rows (W,) int64: the rows of x to use. wide: in float32, rounded to x's dtype before.
    """
    if rows is not None:
        x = x.index_select(0, rows)
    if norm is not None:
        x = rms_norm(x, norm, eps)
    y = F.linear(x, weight.data) if weight.scale is None else _scaled(x, weight.data, weight.scale)
    if gated:
        y = swiglu(*y.chunk(2, dim=-1))
    if residual is not None:
        y = residual + y
        if twice:
            y = residual + y
    return y.float() if wide else y


def _scaled(x: Tensor, data: Tensor, scale: Tensor) -> Tensor:
    return (F.linear(x, data.to(x.dtype)).float() * scale).to(x.dtype)


def traffic(rows: int, out: int, width: int, itemsize: int, *, fp8: bool = False, norm: bool = False) -> Traffic:
    """Bytes of `linear`: the weight once, its scales, the norm, the rows in and out (`out` before gating)."""
    weight = out * width * (1 if fp8 else itemsize) + 4 * out * fp8 + width * itemsize * norm
    return Traffic(weight + rows * width * itemsize, rows * out * itemsize)


# Triton.


@jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["rows_ptr"])
def linear_kernel(
    x_ptr, rows_ptr, norm_ptr, w_ptr, scale_ptr, residual_ptr, out_ptr, rows, out_dim, eps, gate_ptr,
    NORM: tl.constexpr, GATED: tl.constexpr, RESIDUALS: tl.constexpr,
    IN: tl.constexpr, SEGMENTS: tl.constexpr, WIDTH: tl.constexpr, ROUNDS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr, GATE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One block of outputs, of some blocks of rows. out_dim: outputs after the gate, of which two rows of the weights
    next to each other in a block make one. BLOCK_OUT: rows of the weights in a block."""
    if TRIGGER_FIRST:
        let_next_begin(OVERLAP)
    OUTPUTS: tl.constexpr = BLOCK_OUT // 2 if GATED else BLOCK_OUT
    i = tl.arange(0, BLOCK_OUT)
    if GATED:
        i_weight = tl.program_id(1) * OUTPUTS + i // 2
        m_weight = i_weight < out_dim
        i_weight += i % 2 * out_dim
    else:
        i_weight = tl.program_id(1) * BLOCK_OUT + i
        m_weight = i_weight < out_dim
    if GATE:
        # Under a gate, which may be shut, nothing is read ahead.
        await_inputs(OVERLAP)
        if tl.load(gate_ptr) == 0:
            return
    w0, w1, w2 = hold(w_ptr, i_weight, m_weight, IN, SEGMENTS, WIDTH, ROUNDS)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + i_weight, mask=m_weight, other=0.0)
    if not GATE:
        await_inputs(OVERLAP)

    dtype = x_ptr.dtype.element_ty
    i_out = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    for block in range(tl.program_id(0), (rows + ROWS - 1) // ROWS, tl.num_programs(0)):
        i_row = block * ROWS + tl.arange(0, ROWS)
        i_x = i_row.to(tl.int64)
        if rows_ptr is not None:
            i_x = tl.load(rows_ptr + i_row, mask=i_row < rows, other=0)
        total = multiply(
            x_ptr, norm_ptr, w_ptr, w0, w1, w2, i_x, i_row < rows, i_weight, m_weight, eps,
            IN, SEGMENTS, WIDTH, ROUNDS, ROWS, BLOCK_OUT, NORM,
        )  # fmt: skip
        # Rounds where the twin rounds.
        if scale_ptr is not None:
            total = total.to(dtype).to(tl.float32) * scale[None, :]
        y = total.to(dtype).to(tl.float32)
        if GATED:
            y, up = tl.split(tl.reshape(y, (ROWS, OUTPUTS, 2)))
            gate = (y / (1.0 + tl.exp(-y))).to(dtype).to(tl.float32)
            y = (gate * up).to(dtype).to(tl.float32)
        m_y = (i_row < rows)[:, None] & (i_out < out_dim)[None, :]
        p_y = i_row.to(tl.int64)[:, None] * out_dim + i_out[None, :]
        if RESIDUALS > 0:
            b_residual = tl.load(residual_ptr + p_y, mask=m_y, other=0.0).to(tl.float32)
            y = (b_residual + y).to(dtype).to(tl.float32)
            if RESIDUALS > 1:
                y = b_residual + y
        tl.store(out_ptr + p_y, y.to(dtype).to(out_ptr.dtype.element_ty), mask=m_y)
    if not TRIGGER_FIRST:
        let_next_begin(OVERLAP)


def linear_triton(
    x: Tensor,
    weight: Matrix,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: Tensor | None = None,
    twice: bool = False,
    rows: Tensor | None = None,
    wide: bool = False,
) -> Tensor:
    """As `linear`, for contiguous operands."""
    out, width = weight.data.shape
    count = len(x if rows is None else rows)
    y = x.new_empty(count, out // (1 + gated), dtype=torch.float32 if wide else x.dtype)
    x, norm = before_product(x, norm, eps)
    options = product_options(width, x.dtype, out, weight.data.itemsize)
    linear_kernel[product_grid(count, out, options)](
        x, rows, norm, codes_of(weight.data), weight.scale, residual, y, count, y.shape[1], eps,
        NORM=norm is not None, GATED=gated, RESIDUALS=0 if residual is None else 1 + twice,
        **options, **gate_options(x),
    )  # fmt: skip
    return y


# Row-invariance of the machine's library, for the torch twin.


def row_floor(shapes: Iterable[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> int | None:
    """Fewest rows from which on `linear` is row-invariant for every (out, in) in `shapes`; None if never.

    Tries each shape at about thirty row counts and compares the rows bit by bit.
    """
    generator = torch.Generator().manual_seed(0)
    most = _PROBED_ROWS[-1]
    floor = 1
    for out, width in sorted(set(shapes)):
        x, weight = (t.to(device, dtype) for t in _cancelling(1, most, width, out, generator))
        x, weight = x[0], weight[0]
        expected = F.linear(x, weight)
        agreed = None
        for rows in reversed(_PROBED_ROWS):
            if not torch.equal(F.linear(x[:rows], weight), expected[:rows]):
                break
            agreed = rows
        if agreed == most:
            return None
        floor = max(floor, agreed or 1)
    return floor


def batched_row_floor(shapes: Iterable[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> int | None:
    """The same for the batched products of attention: (rows, in) by (in, out) matrices, two or more at a time. How many
    there are must not matter, either."""
    generator = torch.Generator().manual_seed(0)
    most = 32
    floor = 1
    for out, width in sorted(set(shapes)):
        x, columns = (t.to(device, dtype) for t in _cancelling(_PROBED_BATCHES[-1], most, width, out, generator))
        for weight in (columns.transpose(1, 2).contiguous(), columns.transpose(1, 2)):
            expected = torch.bmm(x, weight)

            def agrees(rows: int, x: Tensor = x, weight: Tensor = weight, expected: Tensor = expected) -> bool:
                some = x[:, :rows].contiguous()
                return all(
                    torch.equal(torch.bmm(some[:count], weight[:count]), expected[:count, :rows])
                    for count in _PROBED_BATCHES
                )

            agreed = None
            for rows in range(most, 0, -1):
                if not agrees(rows):
                    break
                agreed = rows
            if agreed is None:
                return None
            floor = max(floor, agreed)
    return floor


def _cancelling(batch: int, rows: int, width: int, out: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Operands (batch, rows, width) and (batch, out, width) whose products almost cancel, so that every rounding of a
    partial sum shows in the result: with plain random ones two orders of summation give the same bfloat16 in 9,999 of
    10,000 elements."""
    half = width // 2
    x, weight = (
        torch.randn(batch, rows, width, generator=generator),
        torch.randn(batch, out, width, generator=generator),
    )
    order = torch.randperm(half, generator=generator)
    x[..., half : 2 * half] = -x[..., order]
    weight[..., half : 2 * half] = weight[..., order]
    x[..., 2 * half :] = 0
    return x, weight
