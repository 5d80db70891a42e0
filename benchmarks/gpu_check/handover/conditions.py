"""T7: the cost of launching unneeded work: a kernel that returns at once, or a conditional node.

The global transformer runs only where a patch closes. Should it always be launched, and check this itself?
"""

from collections.abc import Callable
from functools import partial

import torch

from engine.costs import bandwidth
from kernels.lang import await_inputs, jit, let_next_begin, tl

from .empty import empty_kernel
from .question import UNDECIDED, Case, NotHere, find
from .scale import Scale
from .tile import WARPS, overlapping

TITLE = "a kernel that is not needed"
MOST_US = 3.0


@jit
def returning_kernel(needed_ptr, out_ptr, OVERLAP: tl.constexpr):
    """Counts the calls in which it was needed."""
    let_next_begin(OVERLAP)
    await_inputs(OVERLAP)
    if tl.load(needed_ptr, volatile=True) == 0:
        return
    tl.atomic_add(out_ptr, 1)


def cases(scale: Scale) -> list[Case]:
    return [{"by": "returning at once"}, {"by": "if node"}]


def measure(scale: Scale, case: Case) -> Case:
    needed = torch.zeros(1, dtype=torch.int32, device=scale.device)
    count = torch.zeros(1, dtype=torch.int32, device=scale.device)
    if case["by"] == "if node":
        return {"us": _if_nodes(scale)}
    launch = partial(returning_kernel[(scale.programs,)], needed, count, num_warps=WARPS, **overlapping(scale.overlaps))
    us = scale.chain_us([launch] * scale.links)
    needed.fill_(1)
    launch()
    if int(count) != scale.programs:
        raise RuntimeError(f"{int(count)} programs ran, not {scale.programs}")
    return {"us": us}


def _if_nodes(scale: Scale) -> float:
    if not hasattr(torch._C, "_CUDAGraph") or not hasattr(torch._C._CUDAGraph, "begin_capture_to_if_node"):
        raise NotHere("this torch records no conditional nodes")
    never = torch.zeros((), dtype=torch.bool, device=scale.device)
    out = torch.zeros(1, device=scale.device)
    kernel: Callable[[], object] = partial(
        empty_kernel[(scale.programs,)], out, TRIGGER_FIRST=False, OVERLAP=False, num_warps=WARPS
    )
    kernel()

    def chain() -> None:
        if not torch.cuda.is_current_stream_capturing():
            return
        graph = torch.cuda.CUDAGraph.get_currently_capturing_graph()
        for _ in range(scale.links):
            graph.begin_capture_to_if_node(never)
            kernel()
            graph.end_capture_to_conditional_node()

    return scale.work_us(bandwidth.recorded(chain, scale.device)) / scale.links


def decide(rows: list[Case]) -> str:
    returning, node = find(rows, by="returning at once"), find(rows, by="if node")
    if not returning:
        return UNDECIDED
    cheaper = returning["us"] if not node else min(returning["us"], node["us"])
    said = f"a kernel that returns at once takes {returning['us']:.2f} us"
    said += f", a node whose condition is false {node['us']:.2f} us" if node else ", conditional nodes were not tried"
    verdict = "launch what may not be needed" if cheaper <= MOST_US else "let the host decide, or stay in one kernel"
    return f"{said} (at most {MOST_US:.0f} hoped): {verdict}."
