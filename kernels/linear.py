"""Matrix products whose rows do not depend on how many rows there are.

A GEMM library picks its inner kernel by the number of rows, and with it the order of summation: one row and nine rows
of the same input can differ in the last bit. Above some small count the choice no longer changes. `row_floor` finds
that count by trying, so that the engine can pad every call up to it.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

_PROBED_ROWS = (*range(1, 18), 23, 24, 31, 32, 33, 48, 63, 64, 65, 128)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (R, in) times weight (out, in) transposed: (R, out). Reads the weight once."""
    return F.linear(x, weight)


def row_floor(shapes: Iterable[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> int | None:
    """Fewest rows from which on `linear` is row-invariant for every (out, in) in `shapes`; None if never.

    Tries each shape with random operands at about thirty row counts and compares the rows bit by bit.
    """
    generator = torch.Generator().manual_seed(0)
    most = _PROBED_ROWS[-1]
    floor = 1
    for out, width in sorted(set(shapes)):
        x = torch.randn(most, width, generator=generator).to(device, dtype)
        weight = torch.randn(out, width, generator=generator).to(device, dtype)
        expected = linear(x, weight)
        agreed = None
        for rows in reversed(_PROBED_ROWS):
            if not torch.equal(linear(x[:rows], weight), expected[:rows]):
                break
            agreed = rows
        if agreed == most:
            return None
        floor = max(floor, agreed or 1)
    return floor


def batched_row_floor(shapes: Iterable[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> int | None:
    """The same for the batched products of attention: (rows, in) by (in, out) matrices, four at a time."""
    generator = torch.Generator().manual_seed(0)
    most = 32
    floor = 1
    for out, width in sorted(set(shapes)):
        x = torch.randn(4, most, width, generator=generator).to(device, dtype)
        for weight in (
            torch.randn(4, width, out, generator=generator).to(device, dtype),
            torch.randn(4, out, width, generator=generator).to(device, dtype).transpose(1, 2),
        ):
            expected = torch.bmm(x, weight)
            agreed = None
            for rows in range(most, 0, -1):
                if not torch.equal(torch.bmm(x[:, :rows].contiguous(), weight), expected[:, :rows]):
                    break
                agreed = rows
            if agreed == most:
                return None
            floor = max(floor, agreed or 1)
    return floor
