"""The index arrays that a stage reads, made on the host once per step and cache."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kernels.attention import AttentionPlan, PlanShape
from kernels.dispatch import plan
from kernels.planning import Lengths, Spans, Tiling
from kernels.pooling import PageTable

from ..memory.pages import BlockTable

Arrays = dict[str, NDArray[np.int64]]
"""The inputs of one stage in one step, in addition to weights and caches, by name."""


class Padding(Protocol):
    """How long arrays are made for a kernel, or for a recorded graph of kernels. `parts`: length of arrays with at most
    one entry per row, in a stage of `rows` padded rows. `most_pages`: of a tile or a table. `least_pages`: see
    `kernels.planning.Lengths.pages`."""

    least_pages: int

    def rows(self, n: int) -> int: ...

    def parts(self, n: int, rows: int) -> int: ...

    def most_pages(self, n: int) -> int: ...


class Plan(msgspec.Struct, frozen=True):
    """An `AttentionPlan` before it is on the device."""

    data: NDArray[np.int64]
    shape: PlanShape
    tiling: Tiling

    def on_device(self, tensors: Mapping[str, Tensor], name: str) -> AttentionPlan:
        """The plan, whose numbers are on the device as `tensors[name]`."""
        return AttentionPlan(tensors[name], self.shape, self.tiling.small, self.tiling.page_size)


def plan_attention(writes: Spans, queries: Spans, tiling: Tiling, padding: Padding, padded_queries: int) -> Plan:
    """Plans one cache of a step, padded for a stage of `padded_queries` queries."""
    rows = padding.rows(writes.num_rows) if writes.num_rows else 0
    lengths = Lengths(rows, padded_queries, padding.parts(0, padded_queries), padding.least_pages)
    data, shape = plan(writes, queries, tiling, lengths)
    return Plan(data, shape._replace(most_pages=padding.most_pages(shape.most_pages)), tiling)


def page_table(name: str, tables: Seq[BlockTable], count: int, padding: Padding) -> Arrays:
    """The inputs `name`_pages and `name`_first of a `PageTable`: of these tables, padded to `count` of them."""
    assert len(tables) <= count
    pages = np.zeros((count, padding.most_pages(max(1, *(len(table.pages) for table in tables)))), dtype=np.int64)
    for row, table in zip(pages, tables, strict=False):
        row[: len(table.pages)] = table.pages
    return {f"{name}_pages": pages, f"{name}_first": padded_array([table.first for table in tables], count)}


def table_of(tensors: Mapping[str, Tensor], name: str) -> PageTable:
    """The table of these inputs, on the device."""
    return PageTable(tensors[f"{name}_pages"], tensors[f"{name}_first"])


def padded_array(values: list[int], length: int) -> NDArray[np.int64]:
    """The values, and zeros after them up to `length`."""
    return np.array(values + [0] * (length - len(values)), dtype=np.int64)
