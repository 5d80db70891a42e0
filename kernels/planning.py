"""From spans of rows to the index arrays of attention.

Integer bookkeeping, always on the host. The CPU's own kernels do the same in C.
"""

from array import array
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .attention import PlanShape

SPAN = 7
"""Numbers of a span: where its pages begin in `Spans.pages`, the sequence's page number there, the cache row of its
first row, its number of rows, the lowest cache row that they see, how many of the last rows see each other, and the
highest cache row that these see."""


class Spans:
    """Consecutive rows of sequences in one cache, a span each.

    A row sees the cache rows before it and itself, back to `floor` and within the cache's window; of a span's last
    `mutual` rows each sees up to `last`.
    """

    def __init__(self) -> None:
        self.spans = array("q")
        self.pages = array("q")
        self.num_rows = 0

    def add(
        self, pages: "array[int]", first_page: int, start: int, count: int, floor: int, mutual: int = 0, last: int = 0
    ) -> None:
        """pages: of one sequence, the first of them its page number `first_page`."""
        self.spans.extend((len(self.pages), first_page, start, count, floor, mutual, last))
        self.pages.extend(pages)
        self.num_rows += count


class Tiling(NamedTuple):
    """Window and grouping of a cache's rows. window: rows that a row sees, 0 for all. Tiles of up to `small` rows for
    short spans, of `large` for others."""

    small: int
    large: int
    page_size: int
    window: int


class Lengths(NamedTuple):
    """Padded lengths of a plan's arrays. tiles: 0 for no padding. pages: 0 for no padding, else at least this many,
    rounded up to a power of two."""

    rows: int
    queries: int
    tiles: int = 0
    pages: int = 0


def plan(
    writes: Spans, queries: Spans, tiling: Tiling, lengths: Lengths
) -> tuple[NDArray[np.int64], PlanShape]:  # fmt: skip
    """The numbers of an `AttentionPlan`. writes: the rows whose K/V (or states) are stored; queries: those that attend,
    the same rows for self-attention. Padding rows write to the scratch page and see nothing, in separate tiles."""
    positions: list[int] = []
    page: list[int] = []
    offset: list[int] = []
    for pages_at, first_page, start, count, _, _, _ in _spans(writes):
        rows = range(start, start + count)
        positions += rows
        page += [writes.pages[pages_at + row // tiling.page_size - first_page] for row in rows]
        offset += [row % tiling.page_size for row in rows]

    first: list[int] = []
    last: list[int] = []
    tiles: list[int] = []
    pages: list[int] = []
    most_pages = 1
    for pages_at, first_page, start, count, floor, mutual, highest in _spans(queries):
        span_first = [max(row - tiling.window + 1, floor) if tiling.window else floor for row in _rows(start, count)]
        span_last = [*_rows(start, count - mutual), *[highest] * mutual]
        size = tiling.small if count <= tiling.small else tiling.large
        for begin in range(0, count, size):
            end = min(begin + size, count)
            from_page, to_page = span_first[begin] // tiling.page_size, span_last[end - 1] // tiling.page_size
            tiles += (len(first) + begin, end - begin, len(pages), from_page, to_page + 1 - from_page)
            pages += queries.pages[pages_at + from_page - first_page : pages_at + to_page + 1 - first_page]
            most_pages = max(most_pages, to_page + 1 - from_page)
        first += span_first
        last += span_last
    for begin in range(len(first), lengths.queries, tiling.large):
        tiles += (begin, min(tiling.large, lengths.queries - begin), 0, 0, 0)

    num_tiles = lengths.tiles or len(tiles) // 5
    num_pages = 1 << (max(len(pages), lengths.pages) - 1).bit_length() if lengths.pages else len(pages)
    shape = PlanShape(lengths.rows, lengths.queries, num_tiles, num_pages, most_pages)
    arrays = positions, page, offset, first, last, tiles, pages
    padded = (values + [0] * (size - len(values)) for values, size in zip(arrays, shape.sizes, strict=True))
    return np.array([number for values in padded for number in values], dtype=np.int64), shape


def _spans(of: Spans) -> list[list[int]]:
    numbers = of.spans.tolist()
    return [numbers[i : i + SPAN] for i in range(0, len(numbers), SPAN)]


def _rows(start: int, count: int) -> range:
    return range(start, start + count)
