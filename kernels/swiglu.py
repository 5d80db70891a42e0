"""The gate of a feed-forward layer."""

from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise.

    Written out, because torch's silu and sigmoid round differently at the ends of their chunks, so that an element's
    value would depend on how many others there are; its exp does not.
    """
    g = gate.float()
    return (g / (1 + (-g).exp())).to(gate.dtype) * up
