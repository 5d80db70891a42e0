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
    """First of all in every kernel: nothing is read or written before all that was launched earlier is done.

    A kernel that is launched so may be brought onto the device while the one before it still runs, and lets the next
    one be brought there.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()


def overlap(tensor: Tensor) -> dict[str, bool]:
    """How to launch a kernel on the tensor's device: as `await_inputs` has it, if the device can."""
    return _overlap(tensor.device) if tensor.is_cuda else {"OVERLAP": False}


@cache
def _overlap(device: torch.device) -> dict[str, bool]:
    able = torch.cuda.get_device_capability(device) >= (9, 0)
    return {"OVERLAP": able, "launch_pdl": able}
