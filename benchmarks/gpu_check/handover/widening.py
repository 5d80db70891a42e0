"""T8: products with float8 weights, by how they become bfloat16."""

from functools import partial

import torch

from kernels.linear import quantize

from .question import UNDECIDED, Case, NotHere, find
from .scale import Scale
from .tile import ASM, BITS, CAST, PLAIN, product

TITLE = "float8 weights"
HOW = {"bfloat16": PLAIN, "cast": CAST, "bits": BITS, "bits by assembler": ASM}
HOPED = 0.6
"""Largest share of bfloat16's time that pays."""


def cases(scale: Scale) -> list[Case]:
    names = list(scale.stacks["global"].matrices)
    return [{"matrix": f"global {name}", "weights": how} for how in HOW for name in names]


def measure(scale: Scale, case: Case) -> Case:
    widening = HOW[case["weights"]]
    if widening == ASM and not scale.on_gpu:
        raise NotHere("the interpreter knows no assembler")
    if widening == CAST and scale.on_gpu and torch.cuda.get_device_capability() < (8, 9):
        raise NotHere("this device has no e4m3 numbers")
    out, width = scale.stacks["global"].matrices[case["matrix"].removeprefix("global ")]
    drawn = list(scale.matrices(out, width))
    if widening != PLAIN:
        drawn = [quantize(matrix).data for matrix in drawn]
    x, y = scale.rows_of(1, width), torch.empty(1, out, device=scale.device, dtype=torch.bfloat16)
    weights = [matrix.view(torch.uint8) for matrix in drawn] if widening in (BITS, ASM) else drawn
    links = [partial(product, x, weight, y, widening=widening, overlaps=scale.overlaps) for weight in weights]
    us = scale.chain_us([links[i % len(links)] for i in range(scale.links)])
    last = drawn[(scale.links - 1) % len(links)].float()
    torch.testing.assert_close(y.float(), x.float() @ last.T, atol=0.02 * float(last.abs().max()) * 8, rtol=0.02)
    return {"us": us, "GB/s": out * width * drawn[0].itemsize / us / 1e3}


def decide(rows: list[Case]) -> str:
    matrices = list(dict.fromkeys(row["matrix"] for row in rows))
    shares: dict[str, list[float]] = {}
    for how in list(HOW)[1:]:
        for name in matrices:
            plain, found = find(rows, matrix=name, weights="bfloat16"), find(rows, matrix=name, weights=how)
            if plain and found:
                shares.setdefault(how, []).append(found["us"] / plain["us"])
    if not shares:
        return UNDECIDED
    said = ", ".join(f"{how} {min(of):.2f} to {max(of):.2f}" for how, of in shares.items())
    best = min(shares, key=lambda how: max(shares[how]))
    if max(shares[best]) <= HOPED:
        verdict = f"build float8 by {best}"
    else:
        verdict = f"float8 saves memory more than time ({best} is the best)"
    return f"of bfloat16's time: {said} (at most {HOPED} hoped): {verdict}."
