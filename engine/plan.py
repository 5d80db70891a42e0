"""From rows of sequences to the index arrays that the kernels read.

Everything here is bookkeeping on the host: Python ints in, a few small arrays out, once per step and cache.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kernels.attention import SEGMENT, AttentionPlan

from .pages import BlockTable

Arrays = dict[str, NDArray[np.int64]]
"""What one stage reads in one step besides weights and caches, by name."""


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


class Padding(Protocol):
    """How long arrays are made: what a kernel, or a recorded graph of kernels, wants. `parts`: what there is at most
    one of per row, in a stage of `rows` padded rows."""

    def rows(self, n: int) -> int: ...

    def parts(self, n: int, rows: int) -> int: ...

    def pages(self, n: int) -> int: ...

    def segments(self, n: int) -> int: ...


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a cache's rows are grouped: tiles of up to `small` rows for short spans, of `large` for others. `split`:
    whether long contexts are spread over the device."""

    small: int
    large: int
    page_size: int
    split: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """An `AttentionPlan` before it is on the device: its arrays, and what of it are numbers."""

    arrays: Arrays
    tiling: Tiling
    most_segments: int

    def on_device(self, tensors: Mapping[str, Tensor], name: str) -> AttentionPlan:
        """The plan whose arrays went to the device as `tensors`, each under `name` and its own name."""
        return AttentionPlan(
            **{key: tensors[f"{name}.{key}"] for key in self.arrays},
            most_segments=self.most_segments,
            small_tile=self.tiling.small,
            page_size=self.tiling.page_size,
        )

    def named(self, name: str) -> Arrays:
        return {f"{name}.{key}": array for key, array in self.arrays.items()}


def plan_attention(
    writes: Seq[Span], queries: Seq[Span], tiling: Tiling, padding: Padding, padded_queries: int
) -> Plan:  # fmt: skip
    """Plans one cache of a step.

    `writes` are the rows whose K/V (or states) are stored, `queries` those that attend, each laid end to end; for
    self-attention they are the same. What is there for padding writes to the scratch page and sees nothing.
    """
    page_size = tiling.page_size
    positions: list[int] = []
    page: list[int] = []
    offset: list[int] = []
    for span in writes:
        pages, base = span.table.pages, span.table.first
        for position in range(span.start, span.start + len(span.first)):
            positions.append(position)
            page.append(pages[position // page_size - base])
            offset.append(position % page_size)

    first: list[int] = []
    last: list[int] = []
    tiles: list[int] = []
    used_pages: list[int] = []
    most_segments = 1
    for span in queries:
        count = len(span.first)
        size = tiling.small if count <= tiling.small else tiling.large
        table = span.table
        for begin in range(0, count, size):
            end = min(begin + size, count)
            lowest = min(span.first[begin:end]) // page_size
            highest = max(span.last[begin:end]) // page_size
            tiles += (len(first) + begin, end - begin, len(used_pages), lowest, highest + 1 - lowest)
            used_pages += table.pages[lowest - table.first : highest + 1 - table.first]
            if tiling.split:
                most_segments = max(most_segments, highest // SEGMENT - lowest // SEGMENT + 1)
        first += span.first
        last += span.last
    for begin in range(len(first), padded_queries, tiling.large):
        tiles += (begin, min(tiling.large, padded_queries - begin), 0, 0, 0)
    num_tiles = padding.parts(len(tiles) // 5, padded_queries)
    padded_rows = padding.rows(len(positions)) if writes else 0

    return Plan(
        {
            "positions": padded_array(positions, padded_rows),
            "page": padded_array(page, padded_rows),
            "offset": padded_array(offset, padded_rows),
            "first": padded_array(first, padded_queries),
            "last": padded_array(last, padded_queries),
            "tiles": padded_array(tiles, 5 * num_tiles).reshape(num_tiles, 5),
            "pages": padded_array(used_pages, padding.pages(len(used_pages))),
        },
        tiling,
        padding.segments(most_segments),
    )


def padded_array(values: list[int], length: int) -> NDArray[np.int64]:
    """The values, and zeros behind them up to `length`."""
    return np.array(values + [0] * (length - len(values)), dtype=np.int64)
