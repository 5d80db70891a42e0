"""On the device a row's result is the same bits whatever rows are beside it, and however its context is cut."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from engine.memory.pages import BlockTable, PagePool
from engine.step.graphs import Eager
from engine.step.plan import plan_attention
from kernels import attention as attention_file
from kernels.attention import TILE, AttentionPlan, attention_triton
from kernels.linear import Matrix, linear_triton, quantize
from kernels.planning import Spans, Tiling

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEVICE = torch.device("cuda")
MOST_ROWS = 64
SHAPES = [
    (6144, 2048, {}),
    (11264, 2048, {"gated": True}),
    (2048, 5632, {"residual": True}),
    (260, 1024, {}),
    (96, 20, {}),
]
"""Out and in of products of the 1B shape, and of one that fits no block."""
HEADS = [(16, 16, 128, 64, None), (16, 16, 64, 64, 512), (24, 8, 128, 64, None), (4, 4, 8, 16, 20)]
"""Heads, heads of keys, their width, rows of a page, window."""


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float8"])
@pytest.mark.parametrize(("out", "width", "form"), SHAPES, ids=str)
def test_linear_rows_do_not_depend_on_their_number(out: int, width: int, form: dict[str, bool], kind: str) -> None:
    if kind == "float8" and DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a device that computes with e4m3")
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    weight = randn(out, width, dtype=dtype) * width**-0.5
    matrix = quantize(weight) if kind == "float8" else Matrix(weight)
    x, before = randn(MOST_ROWS, width, dtype=dtype, seed=1), randn(MOST_ROWS, out, dtype=dtype, seed=2)
    norm = randn(width, dtype=dtype, seed=3)

    def product(begin: int, end: int) -> Tensor:
        residual = before[begin:end].contiguous() if form.get("residual") else None
        how: dict[str, Any] = {"gated": form.get("gated", False), "residual": residual, "norm": norm, "eps": 1e-5}
        return linear_triton(x[begin:end].contiguous(), matrix, **how)

    expected = product(0, MOST_ROWS)
    for rows in range(1, MOST_ROWS + 1):
        assert torch.equal(product(0, rows), expected[:rows]), rows
        assert torch.equal(product(MOST_ROWS - rows, MOST_ROWS), expected[MOST_ROWS - rows :]), rows


class Context:
    """One sequence of `length` rows with keys and values of all of them, in pages in a drawn order."""

    def __init__(self, shape: tuple[int, int, int, int, int | None], length: int, dtype: torch.dtype) -> None:
        self.heads, kv_heads, head_dim, self.page_size, self.window = shape
        self.length = length
        pool = PagePool("test", length // self.page_size + 2)
        order = torch.randperm(pool.num_total, generator=torch.Generator().manual_seed(4)).tolist()
        pool._free = [pool._free[i] for i in order]
        self.table = BlockTable(pool, self.page_size)
        self.table.extend(length)
        pages = (pool.num_total + 1, kv_heads, self.page_size, head_dim)
        self.caches = [randn(*pages, dtype=dtype, seed=5 + i) for i in range(2)]
        self.q = randn(length, self.heads, head_dim, dtype=dtype, seed=7)

    def attend(self, begin: int, end: int) -> Tensor:
        """What rows begin..end-1 see, each all rows before it in the window."""
        spans = Spans()
        spans.add(self.table.pages, self.table.first, begin, end - begin, 0)
        tiling = Tiling(TILE, TILE, self.page_size, self.window or 0)
        plan = plan_attention(spans, spans, tiling, Eager(DEVICE, 1), end - begin)
        on_device: AttentionPlan = plan.on_device({"plan": torch.from_numpy(plan.data).to(DEVICE)}, "plan")
        return attention_triton(self.q[begin:end].contiguous(), *self.caches, on_device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_attention_rows_do_not_depend_on_their_number(shape: tuple[int, int, int, int, int | None], dtype: Any) -> None:
    context = Context(shape, 700, dtype)
    begin = context.length - MOST_ROWS
    expected = context.attend(begin, context.length)
    for rows in range(1, MOST_ROWS + 1):
        assert torch.equal(context.attend(begin, begin + rows), expected[:rows]), rows
        assert torch.equal(context.attend(begin + rows - 1, begin + rows), expected[rows - 1 : rows]), rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_attention_over_a_split_context_is_the_same_bits(
    shape: tuple[int, int, int, int, int | None], dtype: Any
) -> None:
    context = Context(shape, 6000, dtype)
    for rows in (1, 9, 17):
        begin = context.length - rows
        split = context.attend(begin, context.length)
        with mock.patch.object(attention_file, "SCRATCH", 0):
            assert torch.equal(context.attend(begin, context.length), split)
        assert torch.equal(context.attend(begin, begin + 1), split[:1])
        assert not any(made.any() for made in attention_file._counters[split.device]), "reset by the last to arrive"


def test_kernels_do_not_run_in_the_interpreter() -> None:
    """Or all of this would have run in Triton's interpreter."""
    from kernels.lang import IN_INTERPRETER

    assert not IN_INTERPRETER
