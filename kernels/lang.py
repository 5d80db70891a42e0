"""Triton's language, or a stand-in where there is no Triton: the torch twins need none of it."""

import os
from types import SimpleNamespace
from typing import Any

try:
    import triton
    import triton.language as language

    tl: Any = language
    jit: Any = triton.jit
    AVAILABLE = True
except ImportError:
    jit = lambda function: function  # noqa: E731
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
