"""Triton's language, or a placeholder without Triton, which the torch twins do not need."""

import os
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as language
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    tl: Any = language
    jit: Any = triton.jit
    AVAILABLE = True
except ImportError:
    jit = lambda function=None, **_: function or jit  # noqa: E731
    tl = SimpleNamespace(constexpr=lambda value: value)
    AVAILABLE = False

IN_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter; read when the kernels are defined, as Triton does."""
INTERPRETED = tl.constexpr(IN_INTERPRETER)


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least `n` and `least`, for the size of a Triton block."""
    return max(1 << (n - 1).bit_length(), least)


def blocks(n: int, size: int) -> int:
    """Number of blocks of `size` that cover n."""
    return -(-n // size)


@jit
def dot(a, b, total):
    """total + a b, summed in float32, products not rounded."""
    if INTERPRETED:
        # numpy has no bfloat16 (the interpreter would multiply its bits), and its products depend on a row's index.
        return total + tl.sum(a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :], 1)
    return tl.dot(a, b, total, input_precision="ieee")


@jit
def await_inputs(OVERLAP: tl.constexpr):
    """Waits until all earlier launches are done: with overlap a kernel starts before. Every kernel calls it before it
    reads anything but weights, and before it writes."""
    if OVERLAP:
        gdc_wait()


@jit
def let_next_begin(OVERLAP: tl.constexpr):
    """Allows the next kernel to start on the device; without this it starts when this one ends."""
    if OVERLAP:
        gdc_launch_dependents()


def overlap(tensor: Tensor) -> dict[str, bool]:
    """Launch options of a kernel on the tensor's device: overlaps the kernel before (programmatic dependent launch) if
    the device can. Otherwise a chain of small kernels is bound by their starts and ends."""
    return _overlap(tensor.device) if tensor.is_cuda else {"OVERLAP": False}


@cache
def _overlap(device: torch.device) -> dict[str, bool]:
    able = torch.cuda.get_device_capability(device) >= (9, 0)
    return {"OVERLAP": able, "launch_pdl": able}
