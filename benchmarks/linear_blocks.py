"""Finds the fastest blocks of the Triton product on this device, for the products of a model with one row.

`python -m benchmarks.linear_blocks` tries some on every shape and shows the best, then those that `kernels.linear`
chooses. Every product streams matrices that no cache holds, all as one graph; starts and ends of kernels count, as in a
stage. Without a GPU, `--quick` tries it on a toy shape, in Triton's interpreter (TRITON_INTERPRET=1).
"""

import argparse
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from unittest import mock

import torch
from tqdm import tqdm

from benchmarks.report import table
from engine.checkpoint import PRESETS
from engine.costs import bandwidth
from kernels import linear
from kernels.linear import Matrix, linear_triton, quantize

Block = dict[str, int]
STREAMED = 256 << 20
"""Bytes of matrices, several times what a cache holds."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear_blocks", description=__doc__)
    parser.add_argument("--model", choices=PRESETS, default="1b")
    parser.add_argument("--float8", action="store_true", help="weights in float8")
    parser.add_argument("--best", type=int, default=5, help="how many to show (5)")
    parser.add_argument("--processes", type=int, default=8, help="processes that compile in parallel (8)")
    parser.add_argument("--quick", action="store_true", help="a toy shape and two choices of blocks")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = {"toy": (64, 32, False)} if options.quick else shapes_of(options.model)
    tries = [(name, block) for name, (_, width, _) in shapes.items() for block in candidates(width, options.quick)]
    if device.type == "cuda":
        with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
            jobs = [pool.submit(rate, *shapes[name], block, options.float8, device, 1) for name, block in tries]
            for job in tqdm(jobs, desc="compiled"):
                job.exception()
    for name, (out, width, gated) in shapes.items():
        count = 2 if options.quick else max(STREAMED // (out * width * (1 if options.float8 else 2)), 4)
        chosen = linear.linear_blocks(out // (1 + gated), width, 1 if options.float8 else 2, gated=gated)
        found = {}
        for block in [chosen, *(block for owner, block in tries if owner == name)]:
            try:
                found[tuple(block.items())] = rate(out, width, gated, block, options.float8, device, count)
            except Exception as error:  # blocks that do not fit the device
                print(f"{name}: {short(block)}: {error}")
        best = sorted(found, key=lambda key: -found[key])[: options.best]
        shown = [key for key in (*best, tuple(chosen.items())) if key in found]
        rows = [[short(dict(key)), f"{found[key] / 1e9:,.3g}"] for key in shown]
        print(f"\n{name}, {out} x {width}; the last is what is chosen\n\n{table(['blocks', 'GB/s'], rows)}", flush=True)


def shapes_of(model: str) -> dict[str, tuple[int, int, bool]]:
    """(out, in, gated) of the matrices that a byte or a patch reads."""
    shapes = {}
    for name in ("patcher", "global_", "decoder"):
        stack = getattr(PRESETS[model], name)
        keys = 2 * stack.num_kv_heads * stack.head_dim
        shapes[f"{name} qkv"] = (stack.num_heads * stack.head_dim + keys, stack.dim, False)
        shapes[f"{name} o"] = (stack.dim, stack.num_heads * stack.head_dim, False)
        shapes[f"{name} gate, up"] = (2 * stack.ffn_dim, stack.dim, True)
        shapes[f"{name} down"] = (stack.dim, stack.ffn_dim, False)
    return shapes


def candidates(width: int, quick: bool) -> Iterator[Block]:
    """Blocks whose loads in flight fit into the shared memory of most devices."""
    choices = product((16, 32), (128, 256, 512), (2, 4), (3, 4, 6, 8), (0, 512))
    for out, block_in, warps, stages, ahead in [(16, 32, 4, 2, 0), (32, 32, 4, 2, 0)] if quick else choices:
        if block_in <= width and (16 + 2 * out) * block_in * 2 * stages <= 160 << 10:
            yield {
                "BLOCK_ROWS": 16, "BLOCK_OUT": out, "BLOCK_IN": block_in, "AHEAD": ahead,
                "num_warps": warps, "num_stages": stages,
            }  # fmt: skip


def rate(
    out: int, width: int, gated: bool, block: Block, float8: bool, device: torch.device, count: int
) -> float:  # fmt: skip
    """Bytes of weights per second in products of one row with `count` matrices (out, width)."""
    drawn = torch.randn(count, out, width, device=device, dtype=torch.bfloat16) * width**-0.5
    matrices = [quantize(data) if float8 else Matrix(data) for data in drawn]
    x = torch.randn(1, width, device=device, dtype=torch.bfloat16)
    with mock.patch.object(linear, "linear_blocks", lambda *_, **__: block):
        return bandwidth.stream_rate(lambda matrix: linear_triton(x, matrix, gated=gated), matrices, device)


def short(block: Block) -> str:
    names = ("BLOCK_OUT", "BLOCK_IN", "num_warps", "num_stages", "AHEAD")
    return ", ".join(f"{name.removeprefix('num_').lower()} {block[name]}" for name in names)


if __name__ == "__main__":
    main()
