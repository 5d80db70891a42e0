"""RMS normalisation."""

import torch.nn.functional as F
from torch import Tensor

from .gate import gate_options
from .lang import await_inputs, jit, let_next_begin, power_of_two, tl
from .traffic import Traffic


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32, rounded once to x's dtype.

    x (..., d), weight (d,).
    """
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def traffic(rows: int, width: int, itemsize: int) -> Traffic:
    return Traffic((rows + 1) * width * itemsize, rows * width * itemsize)


@jit
def rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, width, eps, gate_ptr, BLOCK: tl.constexpr, GATE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row."""
    let_next_begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    m = i < width
    weight = tl.load(weight_ptr + i, mask=m, other=0.0).to(tl.float32)
    await_inputs(OVERLAP)
    if GATE:
        if tl.load(gate_ptr) == 0:
            return
    x = tl.load(x_ptr + row * width + i, mask=m, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, 0) / width + eps)
    tl.store(out_ptr + row * width + i, (x * inverse * weight).to(out_ptr.dtype.element_ty), mask=m)


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `rms_norm`, for contiguous x (R, d): before a product whose programs do not normalise themselves
    (`kernels.product.before_product`)."""
    rows, width = x.shape
    out = x.new_empty(x.shape)
    rms_norm_kernel[(rows,)](x, weight, out, width, eps, BLOCK=power_of_two(width), num_warps=4, **gate_options(x))
    return out
