"""T4: how fast the device reads its memory and its second-level cache."""

from functools import partial

import torch

from kernels.lang import blocks, jit, tl

from .question import UNDECIDED, Case, find
from .scale import Scale
from .tile import WARPS

TITLE = "reading"
ENOUGH = 2.0
"""The cache must be this many times as fast as memory for weights in it to cost almost nothing."""


@jit
def read_kernel(x_ptr, out_ptr, count, rounds, BLOCK: tl.constexpr):
    """Sums blocks of x (count * BLOCK,), one per program and round, in each round another."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for r in range(rounds):
        block = ((program + r * programs) % count).to(tl.int64)
        total += tl.load(x_ptr + block * BLOCK + tl.arange(0, BLOCK), cache_modifier=".cg").to(tl.float32)
    tl.store(out_ptr + program, tl.sum(total, 0))


def cases(scale: Scale) -> list[Case]:
    return [{"from": "memory"}, {"from": "cache"}]


def measure(scale: Scale, case: Case) -> Case:
    block = 8192 if scale.on_gpu else 64
    size = 2 * scale.streamed if case["from"] == "memory" else scale.resident
    count = max(2, size // (2 * block))
    x = torch.ones(count * block, device=scale.device, dtype=torch.bfloat16)
    # Four programs fit a multiprocessor; a block comes to another program each time, so that no L1 holds it.
    programs = min(count, 4 * scale.programs + 3)
    times = 1 if case["from"] == "memory" else 16
    rounds = blocks(count, programs) * times
    out = torch.zeros(programs, device=scale.device)
    work = partial(read_kernel[(programs,)], x, out, count, rounds, BLOCK=block, num_warps=WARPS)
    us = scale.work_us(work, times=10)
    if not bool((out == rounds * block).all()):
        raise RuntimeError(f"the sums are wrong: {out}, not {rounds * block}")
    return {"us": us, "GB/s": programs * rounds * block * 2 / us / 1e3}


def decide(rows: list[Case]) -> str:
    memory, cache = find(rows, **{"from": "memory"}), find(rows, **{"from": "cache"})
    if not memory or not cache:
        return UNDECIDED
    ratio = cache["GB/s"] / memory["GB/s"]
    verdict = "prefetching into L2 may be enough" if ratio >= ENOUGH else "prefetching into L2 is not enough"
    return (
        f"the peak that use is measured by is {memory['GB/s']:,.0f} GB/s; the cache gives {ratio:.1f} times that: "
        f"{verdict}{'' if ratio >= ENOUGH else ', weights must be in registers or shared memory before the data is'}."
    )
