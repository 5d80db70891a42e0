"""Random operands for kernels, and ragged layouts of sequences: one row, many, lengths at the edges of pages."""

import os

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.graphs import Eager
from engine.pages import BlockTable, PagePool
from engine.plan import Plan, Span, Tiling, plan_attention
from kernels.attention import TILE, AttentionPlan

CPU = torch.device("cpu")
TRITONS = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
"""Where Triton's kernels run: on a CUDA device where there is one, else in the interpreter."""
FLOATS = st.sampled_from([torch.float32, torch.bfloat16])
SEEDS = st.integers(0, 2**20)
few = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""The interpreter takes about a millisecond per program and operation."""
Layout = tuple[int, list[tuple[int, int, int | None, int]]]
"""A page size, and per sequence: rows before, rows now, window, how many of the last rows see each other."""


class Draw:
    """Random operands on the device."""

    def __init__(self, seed: int, device: torch.device = CPU) -> None:
        self.device = device
        self._generator = torch.Generator().manual_seed(seed)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self.device, dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator, dtype=torch.float64).to(self.device)

    def below(self, bound: int, *shape: int) -> Tensor:
        return torch.randint(bound, shape, generator=self._generator).to(self.device)

    def shuffled(self, n: int) -> list[int]:
        order: list[int] = torch.randperm(n, generator=self._generator).tolist()
        return order


def close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    # bfloat16 has 8 bits, several roundings follow each other, and the interpreter cuts where devices round. What is
    # computed is shown in float32.
    tolerance = {"atol": 2e-5, "rtol": 1e-4} if expected.dtype == torch.float32 else {"atol": 0.1, "rtol": 0.06}
    torch.testing.assert_close(found.float(), expected.float(), **tolerance)


@st.composite
def layouts(draw: st.DrawFn, most: int = 4) -> Layout:
    page_size = draw(st.sampled_from([4, 8, 16]))
    before = st.one_of(st.integers(0, 70), st.integers(0, 6).map(lambda n: n * page_size), st.just(300))
    sequence = st.tuples(
        before, st.integers(1, 20), st.sampled_from([None, 1, 7, 33]), st.sampled_from([0, 0, 1, 5, 20])
    )
    return page_size, draw(st.lists(sequence, min_size=1, max_size=most))


class Laid:
    """Sequences as `layouts` draws them, with pages in random places, and a plan for attention."""

    def __init__(self, layout: Layout, draw: Draw, split: bool) -> None:
        self.page_size, sequences = layout
        self.device = draw.device
        pool = PagePool("test", 400)
        order = draw.shuffled(pool.num_total)
        pool._free = [pool._free[i] for i in order]
        spans = []
        for before, rows, window, num_block in sequences:
            table = BlockTable(pool, self.page_size)
            table.extend(before + rows)
            first = [0 if window is None else max(r - window + 1, 0) for r in range(before, before + rows)]
            table.trim_before(min(first))
            end = before + rows
            mutual = min(num_block, rows)
            spans.append(Span(table, before, first, [*range(before, end - mutual), *[end - 1] * mutual]))
        self.num_rows = sum(len(span.first) for span in spans)
        self.num_pages = pool.num_total + 1
        padding = Eager(self.device, self.num_rows + 3)
        self.plan = plan_attention(
            spans, spans, Tiling(TILE, TILE, self.page_size, split), padding, padding.rows(self.num_rows)
        )

    def on_device(self) -> AttentionPlan:
        return planned(self.plan, self.device)


def planned(plan: Plan, device: torch.device) -> AttentionPlan:
    tensors = {name: torch.from_numpy(array).to(device) for name, array in plan.named("plan").items()}
    return plan.on_device(tensors, "plan")
