"""T11: the norm inside a product, by every program, or as a kernel before it; weights are prefetched before the wait.
With weights loaded after it, inside was slower on an H200 (docs/gpu.md).
"""

from functools import partial

import torch
from torch import Tensor

from kernels.norm import rms_norm, rms_norm_triton

from .question import UNDECIDED, Case, find
from .scale import Scale
from .tile import product

TITLE = "a norm and a product"


def cases(scale: Scale) -> list[Case]:
    names = [f"{stack} {matrix}" for stack in scale.stacks for matrix in ("qkv", "gate, up")]
    return [{"matrix": name, "norm": where} for name in names for where in ("inside", "apart")]


def measure(scale: Scale, case: Case) -> Case:
    stack, _, matrix = case["matrix"].partition(" ")
    out, width = scale.stacks[stack].matrices[matrix]
    weights, x = scale.matrices(out, width), scale.rows_of(1, width)
    norm = torch.ones(width, device=scale.device, dtype=torch.bfloat16)
    y = torch.empty(1, out, device=scale.device, dtype=torch.bfloat16)

    def inside(weight: Tensor) -> None:
        product(x, weight, y, norm=norm, overlaps=scale.overlaps)

    def apart(weight: Tensor) -> None:
        product(rms_norm_triton(x, norm, 1e-5), weight, y, overlaps=scale.overlaps)

    link = inside if case["norm"] == "inside" else apart
    links = [partial(link, weight) for weight in weights]
    us = scale.chain_us([links[i % len(links)] for i in range(scale.links)])
    last = weights[(scale.links - 1) % len(links)]
    wanted = rms_norm(x, norm, 1e-5).float() @ last.float().T
    torch.testing.assert_close(y.float(), wanted, atol=0.03, rtol=0.02)
    return {"us": us}


def decide(rows: list[Case]) -> str:
    saved = {}
    for name in dict.fromkeys(row["matrix"] for row in rows):
        inside, apart = find(rows, matrix=name, norm="inside"), find(rows, matrix=name, norm="apart")
        if inside and apart:
            saved[name] = apart["us"] - inside["us"]
    if not saved:
        return UNDECIDED
    said = ", ".join(f"{name} {us:+.2f} us" for name, us in saved.items())
    if all(us > 0 for us in saved.values()):
        verdict = "put norms into products"
    elif any(us > 0 for us in saved.values()):
        verdict = "put norms into the products that gain"
    else:
        verdict = "norms stay kernels of their own"
    return f"the norm inside saves: {said}: {verdict}."
