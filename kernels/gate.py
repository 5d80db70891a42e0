"""Work that the device skips: kernels launched under a gate return at once where its flag is 0.

The host launches the global stage before it knows whether a patch has closed. A graph cannot branch in every torch that
is supported, so each kernel asks for itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .lang import overlap

_gates: list[Tensor] = []


@contextmanager
def under(flag: Tensor) -> Iterator[None]:
    """Launches kernels under a flag (1,) int64 on their device. Where it is 0, those of the global stage write nothing;
    their outputs are undefined."""
    _gates.append(flag)
    try:
        yield
    finally:
        _gates.pop()


def gate_options(tensor: Tensor) -> dict[str, Any]:
    """Launch options of a kernel that has a gate, on the tensor's device."""
    return {"gate_ptr": _gates[-1] if _gates else tensor, "GATE": bool(_gates), **overlap(tensor)}
