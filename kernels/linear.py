"""Row-invariant matrix products, with the operations before and after them.

A GEMM library picks its inner kernel by the number of rows, and with it the order of summation: one row and nine rows
of the same input can differ in the last bit. Above some small count the choice no longer changes. `row_floor` measures
that count, so that the engine can pad every call up to it.

The Triton kernel is made for few rows: it streams the weights once and keeps the rows in registers. Every output is
summed over ascending blocks of the inner dimension with the same instructions, whatever the number of rows.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .gate import gate_options
from .lang import (
    IN_INTERPRETER,
    await_inputs,
    blocks,
    dot,
    jit,
    let_next_begin,
    power_of_two,
    prefetch,
    tl,
)
from .norm import rms_norm, rms_norm_triton
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
) -> Tensor:
    """x (R, in) times weight (out, in) transposed, in x's dtype.

    norm (in,): x goes through RMS normalisation with it first. gated: the first half of the outputs gates the second,
    silu(first) * second, (R, out / 2). residual: added to the result; `twice`: residual + (residual + result).
    """
    if norm is not None:
        x = rms_norm(x, norm, eps)
    y = F.linear(x, weight.data) if weight.scale is None else _scaled(x, weight.data, weight.scale)
    if gated:
        y = swiglu(*y.chunk(2, dim=-1))
    if residual is not None:
        y = residual + y
        if twice:
            y = residual + y
    return y


def _scaled(x: Tensor, data: Tensor, scale: Tensor) -> Tensor:
    return (F.linear(x, data.to(x.dtype)).float() * scale).to(x.dtype)


def traffic(rows: int, out: int, width: int, itemsize: int, *, fp8: bool = False, norm: bool = False) -> Traffic:
    """Bytes of `linear`: the weight once, its scales, the norm, the rows in and out (`out` before gating). Normalised
    rows pass between two kernels through the cache."""
    weight = out * width * (1 if fp8 else itemsize) + 4 * out * fp8 + width * itemsize * norm
    return Traffic(weight + rows * width * itemsize, rows * out * itemsize)


# Triton.


@jit(do_not_specialize=["rows"])
def linear_kernel(
    x_ptr, w_ptr, scale_ptr, residual_ptr, out_ptr,
    rows, out_dim, in_dim, gate_ptr,
    GATED: tl.constexpr, SCALED: tl.constexpr, RESIDUALS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, AHEAD: tl.constexpr,
    GATE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One block of rows by one block of outputs. out_dim: outputs after the gate. AHEAD: elements of each weight row
    prefetched while the kernel before still runs,
    but not under a gate, which may be shut."""
    i_row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    i_out = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    i_in = tl.arange(0, BLOCK_IN)
    m_row, m_out = i_row < rows, i_out < out_dim
    p_x = x_ptr + i_row.to(tl.int64)[:, None] * in_dim + i_in[None, :]
    p_w = w_ptr + i_out.to(tl.int64)[:, None] * in_dim + i_in[None, :]
    p_up = w_ptr + (i_out + out_dim).to(tl.int64)[:, None] * in_dim + i_in[None, :]
    dtype = x_ptr.dtype.element_ty

    if OVERLAP and AHEAD > 0 and not GATE:
        LINE: tl.constexpr = 1024 // w_ptr.dtype.element_ty.primitive_bitwidth
        i_line = tl.arange(0, BLOCK_OUT * AHEAD // LINE)
        # Nothing beyond the matrix is prefetched.
        ahead_out = tl.minimum(tl.program_id(1) * BLOCK_OUT + i_line // (AHEAD // LINE), out_dim - 1).to(tl.int64)
        ahead_in = tl.minimum(i_line % (AHEAD // LINE) * LINE, in_dim - 1)
        prefetch((w_ptr + ahead_out * in_dim + ahead_in).to(tl.int64))
        if GATED:
            prefetch((w_ptr + (ahead_out + out_dim) * in_dim + ahead_in).to(tl.int64))
    await_inputs(OVERLAP)
    if GATE:
        if tl.load(gate_ptr) == 0:
            return

    total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    total_up = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    for start in range(0, in_dim, BLOCK_IN):
        m_in = start + i_in < in_dim
        b_x = tl.load(p_x + start, mask=m_row[:, None] & m_in[None, :], other=0.0)
        m_w = m_out[:, None] & m_in[None, :]
        b_w = tl.load(p_w + start, mask=m_w, other=0.0, eviction_policy="evict_first").to(dtype)
        total = dot(b_x, tl.trans(b_w), total)
        if GATED:
            b_up = tl.load(p_up + start, mask=m_w, other=0.0, eviction_policy="evict_first").to(dtype)
            total_up = dot(b_x, tl.trans(b_up), total_up)
    # Not earlier: the next kernel's loads would compete with these.
    let_next_begin(OVERLAP)

    # Rounds where the twin rounds.
    if SCALED:
        total = total.to(dtype).to(tl.float32) * tl.load(scale_ptr + i_out, mask=m_out, other=0.0)[None, :]
    y = total.to(dtype).to(tl.float32)
    if GATED:
        if SCALED:
            scale_up = tl.load(scale_ptr + out_dim + i_out, mask=m_out, other=0.0)
            total_up = total_up.to(dtype).to(tl.float32) * scale_up[None, :]
        gate = (y / (1.0 + tl.exp(-y))).to(dtype).to(tl.float32)
        y = (gate * total_up.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    m_y = m_row[:, None] & m_out[None, :]
    p_y = i_row.to(tl.int64)[:, None] * out_dim + i_out[None, :]
    if RESIDUALS > 0:
        b_residual = tl.load(residual_ptr + p_y, mask=m_y, other=0.0).to(tl.float32)
        y = (b_residual + y).to(dtype).to(tl.float32)
        if RESIDUALS > 1:
            y = b_residual + y
    tl.store(out_ptr + p_y, y.to(dtype), mask=m_y)


def linear_triton(
    x: Tensor,
    weight: Matrix,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: Tensor | None = None,
    twice: bool = False,
) -> Tensor:
    """As `linear`, for contiguous operands."""
    if norm is not None:
        x = rms_norm_triton(x, norm, eps)
    rows, width = x.shape
    out = weight.data.shape[0] // (1 + gated)
    y = x.new_empty(rows, out)
    block = linear_blocks(out, width, weight.data.itemsize, gated=gated)
    # Blocks of rows first: they read the same weights soon after each other.
    grid = (blocks(rows, block["BLOCK_ROWS"]), blocks(out, block["BLOCK_OUT"]))
    linear_kernel[grid](
        x, weight.data, weight.scale, residual, y, rows, out, width,
        GATED=gated, SCALED=weight.scale is not None, RESIDUALS=0 if residual is None else 1 + twice,
        **block, **gate_options(x),
    )  # fmt: skip
    return y


AHEAD = 512
"""Elements of each weight row that are prefetched."""


def linear_blocks(out: int, width: int, itemsize: int, *, gated: bool) -> dict[str, int]:
    """Block sizes, warps and loads in flight: the fastest on an H200 with one row.
    itemsize: of the weights.

    Independent of the number of rows: with other blocks the compiler may sum in another order.
    """
    if itemsize > 2:
        block_out, block_in, warps, stages = 16 if out <= 4096 else 32, 128, 4, 3
    elif (gated or out > 2 * width) and (itemsize == 1 or width < 2048 and gated):
        block_out, block_in, warps, stages = 32, 256, 4, 4
    elif gated:
        block_out, block_in, warps, stages = 32, 128, 2, 6
    elif out > 2 * width:
        block_out, block_in, warps, stages = 16, 128, 2, 8
    elif itemsize == 1:
        block_out, block_in, warps, stages = 16, 256, 2, 6
    else:
        block_out, block_in, warps, stages = 16, 512, 2, 4
    return {
        "BLOCK_ROWS": 16,
        "BLOCK_OUT": 256 if IN_INTERPRETER else block_out,
        "BLOCK_IN": min(power_of_two(width, 32), block_in),
        "AHEAD": min(power_of_two(width, 128), AHEAD),
        "num_warps": warps,
        "num_stages": stages,
    }


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
