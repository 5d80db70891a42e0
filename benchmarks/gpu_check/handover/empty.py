"""T1: the cost of a kernel that does nothing, in a chain of such kernels."""

from functools import partial

import torch
from torch import Tensor

from kernels.lang import await_inputs, jit, let_next_begin, tl

from .question import UNDECIDED, Case, find
from .scale import Scale
from .tile import WARPS, overlapping

TITLE = "an empty kernel"
KERNELS_PER_BYTE = 343
"""Kernels per byte of blt on the 1B shape, from a profile on an H200."""


@jit
def empty_kernel(out_ptr, TRIGGER_FIRST: tl.constexpr, OVERLAP: tl.constexpr):
    if TRIGGER_FIRST:
        let_next_begin(OVERLAP)
    await_inputs(OVERLAP)
    if not TRIGGER_FIRST:
        let_next_begin(OVERLAP)


def cases(scale: Scale) -> list[Case]:
    return [{"launch": "plain"}, {"launch": "trigger first"}, {"launch": "trigger last"}]


def measure(scale: Scale, case: Case) -> Case:
    overlaps = scale.overlaps and case["launch"] != "plain"
    first = case["launch"] == "trigger first"
    out = torch.zeros(1, device=scale.device)
    return {"us": scale.chain_us([partial(_launch, scale.programs, out, first, overlaps)] * scale.links)}


def _launch(programs: int, out: Tensor, first: bool, overlaps: bool) -> None:
    empty_kernel[(programs,)](out, TRIGGER_FIRST=first, num_warps=WARPS, **overlapping(overlaps))


def decide(rows: list[Case]) -> str:
    plain, overlapped = find(rows, launch="plain"), find(rows, launch="trigger first")
    if not plain or not overlapped:
        return UNDECIDED
    least = min(row["us"] for row in rows)
    return (
        f"no chain of kernels gets below {least:.2f} us a kernel (0.8 to 1.3 expected): {KERNELS_PER_BYTE} kernels a "
        f"byte cost blt {KERNELS_PER_BYTE * least:,.0f} us. Overlap gives {plain['us'] - overlapped['us']:.2f} us."
    )
