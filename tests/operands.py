"""Random operands for kernels, and ragged layouts of sequences: one row, many, lengths at the edges of pages."""

import os
from itertools import accumulate, pairwise

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.memory.pages import BlockTable, PagePool
from engine.step.graphs import Eager
from engine.step.plan import Plan, plan_attention
from kernels.attention import TILE, AttentionPlan
from kernels.boundary import Rule
from kernels.planning import Spans, Tiling
from kernels.pooling import PageTable
from kernels.text import Text

CPU = torch.device("cpu")
TRITONS = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
"""Where Triton's kernels run: on a CUDA device where there is one, else in the interpreter."""
RULES = [
    Rule(1.0), Rule(1.0, longest=3), Rule(0.3, monotonic=True), Rule(1.0, rise=0.2, longest=8), Rule(0, every_byte=True)
]  # fmt: skip
LONGEST = 32
"""Positions of a slot."""
FLOATS = st.sampled_from([torch.float32, torch.bfloat16])
SEEDS = st.integers(0, 2**20)
few = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""The interpreter takes about a millisecond per program and operation. The GPU check reads no
conftest.py, so everything is said here."""
Layout = tuple[int, int, list[tuple[int, int, int, int]]]
"""A page size, a window (0 for none), and per sequence: rows before, rows now, the lowest that they see, and how many
of the last rows see each other."""


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

    def text(self, slots: int) -> Text:
        """Texts of `LONGEST` ids, one in every slot, in patches of one byte to four."""
        length = torch.arange(LONGEST)
        starts = (torch.rand(slots, LONGEST, generator=self._generator) < 0.5) | (length % 4 == 0)
        patch = starts.int().cumsum(1).int() - 1
        start = torch.where(starts, length, 0).cummax(1).values.int()
        entropies = (self.uniform(slots * LONGEST) * 2).float()
        of_bytes = (values.flatten().to(self.device) for values in (patch, start))
        return Text(self.below(260, slots * LONGEST), entropies, *of_bytes)

    def bytes_of(self, slots: int, count: int) -> tuple[Tensor, Tensor]:
        """Places in `text`, and the positions there."""
        positions = self.below(LONGEST - 1, count)
        return self.below(slots, count) * LONGEST + positions, positions

    def patches(self, sequences: list[tuple[int, int]]) -> tuple[Tensor, Text, Tensor]:
        """For `kernels.boundary.boundaries`, of sequences with so many rows, from such a byte on."""
        ends = [0, *accumulate(count for count, _ in sequences)]
        spans = [
            (begin, end - begin, slot * LONGEST + byte, byte)
            for slot, ((begin, end), (_, byte)) in enumerate(zip(pairwise(ends), sequences, strict=True))
        ]
        entropies, text = self.uniform(ends[-1] + 2).float() * 2, self.text(len(sequences) + 1)
        return entropies, text, torch.tensor(spans, dtype=torch.int64, device=self.device).view(-1, 4)

    def pooled(self, lengths: list[int], page_size: int) -> tuple[int, PageTable, Tensor, Tensor, Tensor]:
        """For `kernels.pooling.patch_max`: how many pages a cache has, and patches of so many bytes, of two sequences
        in turn. The first page of each is gone."""
        most = -(-sum(lengths) // page_size) + 2
        pages = torch.tensor(self.shuffled(2 * most)).view(2, most) + 1
        ends, begin, after = [page_size, page_size], [], []
        for number, length in enumerate(lengths):
            begin.append(ends[number % 2])
            ends[number % 2] += length
            after.append(ends[number % 2])
        sequence = torch.arange(len(lengths)) % 2
        found = (t.to(self.device) for t in (sequence, torch.tensor(begin), torch.tensor(after)))
        return 2 * most + 1, PageTable(pages.to(self.device), torch.ones(2, dtype=torch.int64).to(self.device)), *found

    def params(self, rows: int, vocab_size: int) -> Tensor:
        """For `kernels.sampling.sample`."""
        choices = (0.0, 0.3, 1.0, 2.0), (1.0, min(3.0, vocab_size), vocab_size), (0.0, 0.5, 0.9, 1.0), (0.0, 0.05, 1.0)
        picked = [torch.tensor(values).double()[self.below(len(values), rows).cpu()] for values in choices]
        return torch.stack(picked, 1).to(self.device)

    def shuffled(self, n: int) -> list[int]:
        order: list[int] = torch.randperm(n, generator=self._generator).tolist()
        return order


def close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    # bfloat16 has 8 bits, several roundings follow each other, and the interpreter cuts where devices round. What is
    # computed is shown in float32.
    tolerance = {"atol": 2e-5, "rtol": 1e-4} if expected.dtype == torch.float32 else {"atol": 0.15, "rtol": 0.06}
    torch.testing.assert_close(found.float(), expected.float(), **tolerance)


@st.composite
def layouts(draw: st.DrawFn, most: int = 4, longest: int = 300) -> Layout:
    """longest: rows before a sequence's own, at times."""
    page_size = draw(st.sampled_from([4, 8, 16]))
    befores = st.one_of(
        st.integers(0, min(70, longest)), st.integers(0, 6).map(lambda n: n * page_size), st.just(longest)
    )
    sequences = []
    for _ in range(draw(st.integers(1, most))):
        before = draw(befores)
        floor = draw(st.sampled_from([0, 0, before // 2, before]))
        sequences.append((before, draw(st.integers(1, 20)), floor, draw(st.sampled_from([0, 0, 1, 5, 20]))))
    return page_size, draw(st.sampled_from([0, 1, 7, 33])), sequences


class Laid:
    """Sequences as `layouts` draws them, with pages in random places, and a plan for attention."""

    def __init__(self, layout: Layout, draw: Draw) -> None:
        self.page_size, window, sequences = layout
        self.device = draw.device
        pool = PagePool("test", 400)
        order = draw.shuffled(pool.num_total)
        pool._free = [pool._free[i] for i in order]
        self.spans = Spans()
        for before, rows, floor, num_block in sequences:
            table, end = BlockTable(pool, self.page_size), before + rows
            table.extend(end)
            table.trim_before(max(before - window + 1, floor) if window else floor)
            self.spans.add(table.pages, table.first, before, rows, floor, min(num_block, rows), end - 1)
        self.num_rows = self.spans.num_rows
        self.num_pages = pool.num_total + 1
        padding = Eager(self.device, self.num_rows + 3)
        tiling = Tiling(TILE, TILE, self.page_size, window)
        self.plan = plan_attention(self.spans, self.spans, tiling, padding, padding.rows(self.num_rows))

    def on_device(self) -> AttentionPlan:
        return planned(self.plan, self.device)


def planned(plan: Plan, device: torch.device) -> AttentionPlan:
    return plan.on_device({"plan": torch.from_numpy(plan.data).to(device)}, "plan")
