"""From rows of sequences to the index tensors that the kernels read.

Everything here is bookkeeping on the host: Python ints in, a few small tensors out, once per step and cache.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.attention import AttentionPlan, TileGroup

from .pages import BlockTable

LARGE_TILE = 32
"""Rows per tile where a sequence has more rows than fit into a small tile."""


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive rows of one sequence in one cache.

    first, last: the cache rows that each of them sees, an interval per row. start: the cache row of the first of
    them, used only where they are written.
    """

    table: BlockTable
    start: int
    first: Seq[int]
    last: Seq[int]


class _Tiles:
    """Tiles of one size under construction."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.rows: list[list[int]] = []
        self.pages: list[list[int]] = []
        self.page_index: list[int] = []
        self.first: list[list[int]] = []
        self.last: list[list[int]] = []

    def add(self, row: int, span: Span, begin: int, end: int, page_size: int) -> None:
        """Adds rows begin..end-1 of the span, which are rows `row`, `row` + 1, ... of the batch."""
        first, last = list(span.first[begin:end]), list(span.last[begin:end])
        missing = self.size - (end - begin)
        rows = list(range(row, row + end - begin))
        if missing:
            rows += rows[-1:] * missing
            first += first[-1:] * missing
            last += last[-1:] * missing
        table = span.table
        lowest = min(first) // page_size
        highest = max(last) // page_size
        self.rows.append(rows)
        self.pages.append(table.pages[lowest - table.first : highest + 1 - table.first])
        self.page_index.append(lowest)
        self.first.append(first)
        self.last.append(last)

    def build(self, page_size: int, device: torch.device) -> TileGroup:
        most = max(map(len, self.pages))
        pages = np.array([p + [0] * (most - len(p)) for p in self.pages], dtype=np.int64)
        key_pages = np.array(self.page_index, dtype=np.int64)[:, None] + np.arange(most)
        keys = (key_pages[:, :, None] * page_size + np.arange(page_size))[:, :, None, :]
        first = np.array(self.first, dtype=np.int64)[:, None, :, None]
        last = np.array(self.last, dtype=np.int64)[:, None, :, None]
        hidden = (keys < first) | (keys > last)
        return TileGroup(
            rows=torch.tensor(self.rows, device=device),
            pages=torch.from_numpy(pages).to(device),
            hidden=torch.from_numpy(hidden[:, :, None, None]).to(device),
        )


def plan_attention(
    writes: Seq[Span],
    queries: Seq[Span],
    *,
    page_size: int,
    small_tile: int,
    padded_rows: int,
    padded_queries: int,
    device: torch.device,
) -> AttentionPlan:
    """Plans one cache of a step.

    `writes` are the rows whose K/V (or states) are stored, `queries` those that attend, each laid end to end; for
    self-attention they are the same. Rows up to `padded_rows` and `padded_queries` are padding: they write to the
    scratch page and take some other row's output.
    """
    positions: list[int] = []
    page: list[int] = []
    offset: list[int] = []
    for span in writes:
        pages, base = span.table.pages, span.table.first
        for position in range(span.start, span.start + len(span.first)):
            positions.append(position)
            page.append(pages[position // page_size - base])
            offset.append(position % page_size)
    padding = [0] * (padded_rows - len(positions))

    small, large = _Tiles(small_tile), _Tiles(LARGE_TILE)
    take: list[int] = []
    in_large: list[int] = []
    row = 0
    for span in queries:
        count = len(span.first)
        tiles = small if count <= small_tile else large
        for begin in range(0, count, tiles.size):
            end = min(begin + tiles.size, count)
            base = len(tiles.rows) * tiles.size
            if tiles is large:
                in_large.extend(range(row, row + end - begin))
            take.extend(range(base, base + end - begin))
            tiles.add(row, span, begin, end, page_size)
            row += end - begin
    behind_small = len(small.rows) * small_tile
    for i in in_large:
        take[i] += behind_small
    take += [0] * (padded_queries - len(take))

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return AttentionPlan(
        positions=tensor(positions + padding),
        page=tensor(page + padding),
        offset=tensor(offset + padding),
        groups=tuple(tiles.build(page_size, device) for tiles in (small, large) if tiles.rows),
        take=tensor(take),
    )
