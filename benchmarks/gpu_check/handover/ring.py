"""The chain of `ring.cu`: square products that pass data by words, while their weights stream through shared memory."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .cuda import Kernel, compile_cubin
from .question import Case, NotHere
from .scale import Scale

SOURCE = Path(__file__).with_name("ring.cu")
WARPS, OUTPUTS = 8, 8
PHASES = 200
ROOM = 192 << 10
"""Bytes of shared memory for the ring."""


def defines(dim: int) -> dict[str, int]:
    """How `ring.cu` is compiled for matrices (dim, dim)."""
    return {"DIM": dim, "WARPS": WARPS, "STAGES": ROOM // (OUTPUTS * dim * 2)}


def shared_bytes(dim: int) -> int:
    stages = defines(dim)["STAGES"]
    return stages * OUTPUTS * dim * 2 + WARPS * 8 * OUTPUTS * 4 + 2 * stages * 8


def packed(weights: Tensor, warps: int = WARPS) -> Tensor:
    """weights (P, dim, dim) bfloat16 in the order in which the lanes of a program's warps read them: per phase and
    program [warp][step][lane][half][2], a lane being an output and a pair of columns."""
    phases, dim, _ = weights.shape
    steps = dim // warps // 16
    cut = weights.view(phases, dim // OUTPUTS, OUTPUTS, warps, steps, 2, 4, 2)
    return cut.permute(0, 1, 3, 4, 2, 6, 5, 7).contiguous()


def words_of(x: Tensor, tag: int) -> Tensor:
    """x (R, dim) bfloat16, R at most 8, as tagged words in the first of two buffers: (2, 8, dim) int32."""
    words = torch.zeros(2, 8, x.shape[1], dtype=torch.int32, device=x.device)
    words[0, : len(x)] = (x.contiguous().view(torch.int16).int() << 16) | tag
    return words


def rows_in(words: Tensor, rows: int, phases: int) -> Tensor:
    """The values in the words after `phases` phases: (rows, dim) bfloat16."""
    return (words[phases % 2, :rows] >> 16).to(torch.int16).view(torch.bfloat16)


def expected(weights: Tensor, x: Tensor) -> Tensor:
    for weight in weights:
        x = F.linear(x, weight)
    return x


def measure(scale: Scale, dim: int, peak: float) -> Case:
    """peak: GB/s that the memory gives. Raises NotHere off a device with the copy engine (sm_90 and later)."""
    if not scale.on_gpu or (major := torch.cuda.get_device_capability()[0]) < 9:
        raise NotHere("the ring takes a device of sm_90 or later")
    cubin = compile_cubin(SOURCE, f"sm_{major}{torch.cuda.get_device_capability()[1]}a", defines(dim))
    kernel = Kernel(cubin, "chain", shared_bytes(dim))
    phases = min(PHASES, scale.links)
    weights, x = scale.matrices(dim, dim, phases), scale.rows_of(1, dim)
    laid_out = packed(weights)

    given, words = words_of(x, 1), words_of(x, 1)

    def chain(count: int = phases) -> Tensor:
        words.copy_(given)
        kernel.launch(dim // OUTPUTS, WARPS * 32 + 32, [laid_out, words, count, len(x), 1])
        return words

    # After many phases any two orders of summation differ; after a few they agree.
    few = min(4, phases)
    torch.testing.assert_close(rows_in(chain(few), 1, few), expected(weights[:few], x), atol=0.1, rtol=0.05)
    first = chain().clone()
    if not torch.equal(first, chain()):
        raise RuntimeError("two runs of the ring differ")
    us = scale.work_us(chain, times=10)
    exposed = (us - weights.nbytes / peak / 1e3) / phases
    return {"us": us / phases, "exposed us": exposed, "GB/s": weights.nbytes / us / 1e3}
