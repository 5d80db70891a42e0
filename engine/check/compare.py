"""How far two results of an operation may lie apart."""

import torch
from torch import Tensor

TOLERANCES = {torch.float32: (2e-5, 1e-4), torch.bfloat16: (0.15, 0.06)}
"""Absolute and relative. bfloat16 has 8 bits, several roundings follow each other, and Triton's interpreter cuts where
devices round. What is computed is shown in float32."""


def apart(found: Tensor, expected: Tensor, *, exact: bool) -> float | None:
    """The largest difference of two results of the same shape if they are not close, or if exact, not equal; NaN
    equals NaN. None if they are."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return float("inf")
    found, expected = found.detach().cpu(), expected.detach().cpu()
    if exact:
        wrong = ~((found == expected) | (found.isnan() & expected.isnan()))
    else:
        atol, rtol = TOLERANCES.get(found.dtype, (0.0, 0.0))
        found, expected = found.double(), expected.double()
        wrong = ~torch.isclose(found, expected, atol=atol, rtol=rtol, equal_nan=True)
    if not wrong.any():
        return None
    difference = (found.double() - expected.double()).abs()[wrong]
    return float(difference.nan_to_num(float("inf")).max())
