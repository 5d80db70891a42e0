"""Random operands for kernels, and ragged layouts of sequences, for `fastblt check` and for tests."""

from itertools import accumulate, pairwise

import torch
from torch import Tensor

from kernels.attention import TILE, AttentionPlan
from kernels.planning import Spans, Tiling
from kernels.pooling import PageTable
from kernels.text import Text

from ..memory.pages import BlockTable, PagePool
from ..step.graphs import Eager
from ..step.plan import Plan, plan_attention

CPU = torch.device("cpu")
LONGEST = 32
"""Positions of a slot."""
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
        table = PageTable(pages.to(self.device), torch.ones(2, dtype=torch.int64).to(self.device))
        numbers = torch.stack((sequence, torch.tensor(begin), torch.tensor(after))).to(self.device)
        return 2 * most + 1, table, numbers[0], numbers[1], numbers[2]

    def params(self, rows: int, vocab_size: int) -> Tensor:
        """For `kernels.sampling.sample`."""
        choices = (0.0, 0.3, 1.0, 2.0), (1.0, min(3.0, vocab_size), vocab_size), (0.0, 0.5, 0.9, 1.0), (0.0, 0.05, 1.0)
        picked = [torch.tensor(values).double()[self.below(len(values), rows).cpu()] for values in choices]
        return torch.stack(picked, 1).to(self.device)

    def shuffled(self, n: int) -> list[int]:
        order: list[int] = torch.randperm(n, generator=self._generator).tolist()
        return order

    def sequences(self, rows: int, of_each: int, mutual: int) -> list[tuple[int, int, int, int]]:
        """So many rows of a `Layout`, in sequences of `of_each` rows at most, of which the last `mutual` see each
        other. The first sequence has several segments before it, the next end at the edges of pages."""
        counts = [min(of_each, rows - at) for at in range(0, rows, of_each)]
        befores = ([300, 0, 15, 16, 17] + self.below(90, len(counts)).tolist())[: len(counts)]
        return [(before, count, 0, mutual) for before, count in zip(befores, counts, strict=True)]


class Laid:
    """Sequences with pages in random places, and a plan for attention. padded: rows that see nothing, at its end."""

    def __init__(self, layout: Layout, draw: Draw, padded: int = 3) -> None:
        self.page_size, window, sequences = layout
        self.device = draw.device
        pool = PagePool("test", 400)
        order = draw.shuffled(pool.num_total)
        pool._free = [pool._free[i] for i in order]
        self.spans = Spans()
        self._alone: list[Spans] = []
        for before, rows, floor, num_block in sequences:
            table, end = BlockTable(pool, self.page_size), before + rows
            table.extend(end)
            table.trim_before(max(before - window + 1, floor) if window else floor)
            mutual = min(num_block, rows)
            self.spans.add(table.pages, table.first, before, rows, floor, mutual, end - 1)
            for row in range(before, end):
                single = Spans()
                single.add(table.pages, table.first, row, 1, floor, int(row >= end - mutual), end - 1)
                self._alone.append(single)
        self.num_rows = self.spans.num_rows
        self.num_pages = pool.num_total + 1
        self._tiling = Tiling(TILE, TILE, self.page_size, window)
        self.plan = self._planned(self.spans, padded)

    def _planned(self, spans: Spans, padded: int) -> Plan:
        padding = Eager(self.device, spans.num_rows + padded)
        return plan_attention(spans, spans, self._tiling, padding, padding.rows(spans.num_rows))

    def on_device(self) -> AttentionPlan:
        return planned(self.plan, self.device)

    def of(self, row: int | None) -> AttentionPlan:
        """The plan of one row by itself, which sees what it sees among the others; None for all, as `on_device`."""
        return self.on_device() if row is None else planned(self._planned(self._alone[row], 0), self.device)


def planned(plan: Plan, device: torch.device) -> AttentionPlan:
    return plan.on_device({"plan": torch.from_numpy(plan.data).to(device)}, "plan")
