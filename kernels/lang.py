"""Triton's language, or a stand-in where there is no Triton: the torch twins need none of it."""

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
"""Whether kernels run in Triton's interpreter; as Triton does, it looks when the kernels are defined."""
INTERPRETED = tl.constexpr(IN_INTERPRETER)


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least `n` and `least`: Triton's blocks have such sizes."""
    return max(1 << (n - 1).bit_length(), least)


def blocks(n: int, size: int) -> int:
    """Blocks of `size` that cover n."""
    return -(-n // size)


@jit
def dot(a, b, total):
    """total + a b, summed in float32, products not rounded."""
    if INTERPRETED:
        # numpy knows no bfloat16 (the interpreter would multiply its bits), and its products depend on a row's place.
        return total + tl.sum(a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :], 1)
    return tl.dot(a, b, total, input_precision="ieee")


@jit
def await_inputs(OVERLAP: tl.constexpr):
    """Until all that was launched earlier is done: a kernel may be on the device before. Every kernel does it, before
    it reads anything but weights, and before it writes anything."""
    if OVERLAP:
        gdc_wait()


@jit
def let_next_begin(OVERLAP: tl.constexpr):
    """The next kernel may be brought onto the device; at the latest it is when this one ends."""
    if OVERLAP:
        gdc_launch_dependents()


@jit
def prefetch(addresses):
    """Asks for the lines at these addresses (N,) int64 of global memory to be brought into the second-level cache."""
    asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(asm, "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1)


def overlap(tensor: Tensor) -> dict[str, bool]:
    """How to launch a kernel on the tensor's device: overlapping the one before (programmatic dependent launch), if the
    device can. A chain of small kernels is else bound by their beginnings and ends."""
    return _overlap(tensor.device) if tensor.is_cuda else {"OVERLAP": False}


@cache
def _overlap(device: torch.device) -> dict[str, bool]:
    able = torch.cuda.get_device_capability(device) >= (9, 0)
    return {"OVERLAP": able, "launch_pdl": able}
