"""T3: fat products: segments, when the weights are loaded, when the next kernel may begin."""

from collections.abc import Callable
from functools import partial

import torch

from kernels.linear import Matrix, linear_triton

from .question import UNDECIDED, Case, find
from .scale import Scale
from .tile import product

TITLE = "a product in segments"
NOW = "as now"
CROSSED = ("global down", "decoder o")
"""The matrix with a warp's longest chain of dependent instructions, and a small one."""
SAVED_US = {"global down": 2.0, "decoder o": 1.0}
"""Microseconds by which 8 segments must beat the present kernel."""


def cases(scale: Scale) -> list[Case]:
    names = [f"{stack} {matrix}" for stack, of in scale.stacks.items() for matrix in of.matrices]
    few, *more = scale.rows
    crossed = [
        {"matrix": name, "rows": few, "segments": segments, "weights first": weights, "trigger first": trigger}
        for name in CROSSED
        for segments in (8, 1, 4)
        for weights in (True, False)
        for trigger in (True, False)
    ]
    best = {"segments": 8, "weights first": True, "trigger first": True}
    every = [{"matrix": name, "rows": few, "segments": NOW} for name in names]
    every += [{"matrix": name, "rows": few, **best} for name in names if name not in CROSSED]
    return [
        *(case for case in crossed if case["weights first"] and case["trigger first"]),
        *every,
        *({"matrix": name, "rows": rows, **best} for rows in more for name in names),
        *(case for case in crossed if not (case["weights first"] and case["trigger first"])),
    ]


def measure(scale: Scale, case: Case) -> Case:
    stack, _, matrix = case["matrix"].partition(" ")
    out, width = scale.stacks[stack].matrices[matrix]
    weights = scale.matrices(out, width)
    x = scale.rows_of(case["rows"], width)
    y = torch.empty(case["rows"], out, device=scale.device, dtype=torch.bfloat16)
    if case["segments"] == NOW:
        links: list[Callable[[], object]] = [partial(linear_triton, x, Matrix(weight)) for weight in weights]
    else:
        how = {
            "segments": case["segments"],
            "weights_first": case["weights first"],
            "trigger_first": case["trigger first"],
            "overlaps": scale.overlaps,
        }
        links = [partial(product, x, weight, y, **how) for weight in weights]
    us = scale.chain_us([links[i % len(links)] for i in range(scale.links)])
    if case["segments"] != NOW:
        last = weights[(scale.links - 1) % len(links)]
        torch.testing.assert_close(y.float(), x.float() @ last.float().T, atol=0.03, rtol=0.02)
    return {"us": us, "GB/s": 2 * out * width / us / 1e3}


def decide(rows: list[Case]) -> str:
    said = []
    for name, hoped in SAVED_US.items():
        now = find(rows, matrix=name, segments=NOW)
        eight, one = (
            find(rows, **{"matrix": name, "segments": s, "weights first": True, "trigger first": True}) for s in (8, 1)
        )
        if not now or not eight:
            return UNDECIDED
        saved = now["us"] - eight["us"]
        verdict = "build segments" if saved >= hoped else "less than was hoped"
        alone = ""
        if one:
            alone = f", one {one['us']:.1f}"
            if one["us"] < 1.1 * eight["us"]:
                verdict = "one segment is within 10 %, so that segments are not what helps"
        said.append(
            f"{name}: 8 segments take {eight['us']:.1f} us{alone}, the kernel of now {now['us']:.1f} "
            f"(saves {saved:.1f}; {hoped:.0f} hoped): {verdict}."
        )
    return " ".join(said)
