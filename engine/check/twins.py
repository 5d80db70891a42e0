"""A backend's operations against their torch twins, and each row by itself against the same row among others."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kernels.dispatch import Kernels

from .cases import OPERATIONS, own
from .compare import apart
from .operands import Draw

ROW_COUNTS = (16, 3, 40, 1)
"""The most telling first, as the time may be short."""
EVERY_ROW, SOME_ROWS = 16, 7
"""Up to so many rows each is also run alone; of more, one in so many."""
DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class Trial:
    """An operation in a dtype for so many rows."""

    operation: str
    dtype: torch.dtype
    rows: int

    def __str__(self) -> str:
        return f"{self.operation} ({str(self.dtype).removeprefix('torch.')}, {self.rows} row{'s' * (self.rows != 1)})"


def trials(kernels: Kernels) -> list[Trial]:
    """All of a backend's own operations, each once before any is repeated with other rows; none of torch's."""
    names = [] if kernels.name == "torch" else own(kernels)
    return [Trial(name, dtype, rows) for rows in ROW_COUNTS for dtype in DTYPES for name in names]


def faults(trial: Trial, kernels: Kernels, device: torch.device) -> Iterator[str]:
    """What is wrong, in words. The torch kernels promise nothing of single rows."""
    case = OPERATIONS[trial.operation](Draw(trial.rows, device), trial.dtype, trial.rows)
    found, expected = case.run(kernels, None), case.run(Kernels(), None)
    named = [_named(trial, number, found) for number in range(len(found))]
    for name, ours, theirs in zip(named, found, expected, strict=True):
        if (largest := apart(ours, theirs, exact=case.exact)) is not None:
            yield f"{name}: differs from torch's by up to {largest:.3g}"
    differing: defaultdict[str, dict[int, float]] = defaultdict(dict)
    for row in range(0, trial.rows, 1 if trial.rows <= EVERY_ROW else SOME_ROWS) if trial.rows > 1 else ():
        for name, ours, single in zip(named, found, case.run(kernels, row), strict=True):
            if (largest := apart(single, ours[row : row + 1], exact=True)) is not None:
                differing[name][row] = largest
    for name, rows in differing.items():
        first, more = next(iter(rows)), f" (and so do {len(rows) - 1} more)" if len(rows) > 1 else ""
        yield f"{name}: row {first} alone differs from itself among the others{more} by up to {max(rows.values()):.3g}"


def _named(trial: Trial, number: int, outputs: list[torch.Tensor]) -> str:
    which = f", output {number + 1} of {len(outputs)}" if len(outputs) > 1 else ""
    return f"{trial}{which}, shape {' x '.join(map(str, outputs[number].shape))}"
