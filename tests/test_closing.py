"""Patches that close unread are planned on the device as the host would plan them, and skipped under a shut gate."""

from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels import attention, gate
from kernels.attention import AttentionPlan
from kernels.closing import Closing, Sizes, Tables, closing, closing_triton
from kernels.dispatch import TritonKernels
from kernels.latents import latent_places, latent_places_triton
from kernels.linear import Matrix
from kernels.norm import rms_norm_triton
from kernels.planning import Lengths, Spans, Tiling
from kernels.planning import plan as planned
from kernels.pooling import PageTable
from kernels.rope import rope_table
from kernels.stack import CrossKvWeights
from tests.operands import CPU, LONGEST, SEEDS, Draw, Laid, few
from tests.operands import TRITONS as DEVICE

TRITON = TritonKernels()
LAID = (8, 0, [(40, 2, 0, 0)])
"""A context of many pages."""


class Pages(NamedTuple):
    """Of one sequence in one cache: its pages, and its page number of the first."""

    pages: list[int]
    first: int


class Candidates:
    """Texts whose last rows run unread. A sequence has a slot, and in every cache only the pages that can be read."""

    def __init__(self, draw: Draw, ended: list[tuple[int, int]], sizes: Sizes, padding: int, isolated: bool) -> None:
        """ended: of each sequence the last byte that runs, and how many do."""
        self.text, self.sizes, device = draw.text(len(ended) + 1), sizes, draw.device
        self.patch, self.start = self.text.patch.tolist(), self.text.patch_start.tolist()
        at, positions, sequence, floor = [], [], [], []
        self.pages: dict[str, list[Pages]] = {"open": [], "globals": [], "latent": []}
        for number, (last, count) in enumerate(ended):
            own = range(max(last - count + 1, 0), last + 1)
            place = (number + 1) * LONGEST
            at += [place + byte for byte in own]
            positions += own
            sequence += [number] * len(own)
            begin, patch = self.start[place + own[0]], self.patch[place + own[0]]
            floor.append(patch // 2 if isolated else 0)
            for name, size, low, high in (
                ("open", sizes.open, begin, last),
                ("globals", sizes.globals, floor[-1], self.patch[place + last]),
                ("latent", sizes.latent, patch, self.patch[place + last]),
            ):
                first = low // size
                taken = draw.shuffled(LONGEST)[: high // size - first + 1]
                self.pages[name].append(Pages([page + 1 for page in taken], first))
        self.rows = list(zip(at, positions, sequence, strict=True))
        self.floor = floor

        def ints(values: Any) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        def table(name: str) -> PageTable:
            width = max(len(own.pages) for own in self.pages[name])
            pages = [own.pages + [0] * (width - len(own.pages)) for own in self.pages[name]]
            return PageTable(ints(pages), ints([own.first for own in self.pages[name]]))

        self.tables = Tables(table("open"), table("globals"), table("latent"), ints(floor))
        nothing = [0] * padding
        self.arguments = ints(at + nothing), ints(positions + nothing), ints(sequence + [-1] * padding)

    def closed(self) -> list[int]:
        """The rows that close a patch, by the text."""
        return [row for row, (at, _, _) in enumerate(self.rows) if self.patch[at + 1] != self.patch[at]]

    def planned(self, row: int) -> tuple[AttentionPlan, AttentionPlan]:
        """The host's plans of the one patch that a row closes: its pooling, its row of the global stage."""
        at, position, number = self.rows[row]
        opened, of_global, slots = self.pages["open"][number], self.pages["globals"][number], self.sizes.slots
        begin, patch = self.start[at], self.patch[at]
        queries, rows = Spans(), Spans()
        pages, first = (torch.tensor(of.pages).numpy() for of in (opened, of_global)), (opened.first, of_global.first)
        of_open, of_patches = pages
        queries.add(of_open, first[0], begin, slots, begin, slots, position)  # type: ignore[arg-type]
        rows.add(of_patches, first[1], patch, 1, self.floor[number])  # type: ignore[arg-type]

        def made(writes: Spans, reads: Spans, size: int, count: int) -> AttentionPlan:
            numbers, shape = planned(writes, reads, Tiling(slots, slots, size, 0), Lengths(writes.num_rows, count))
            return AttentionPlan(torch.from_numpy(numbers), shape, slots, size)

        return made(Spans(), queries, self.sizes.open, slots), made(rows, rows, self.sizes.globals, 1)


def seen(plan: AttentionPlan, query: int) -> list[tuple[int, int]]:
    """Pages and offsets of the cache rows that a query sees."""
    for begin, count, at, first_page, num_pages in plan.tiles.tolist():
        if begin <= query < begin + count and num_pages:
            pages, size = plan.pages.tolist()[at : at + num_pages], plan.page_size
            rows = range(int(plan.first[query]), int(plan.last[query]) + 1)
            return [(pages[row // size - first_page], row % size) for row in rows]
    return []


@st.composite
def candidates(draw: st.DrawFn, device: torch.device) -> Candidates:
    sizes = Sizes(*(draw(st.sampled_from([2, 4, 16])) for _ in range(3)), draw(st.integers(1, 3)), 4)
    ended = st.tuples(st.integers(0, LONGEST - 2), st.integers(1, 3))
    drawn = Draw(draw(SEEDS), device)
    return Candidates(
        drawn, draw(st.lists(ended, min_size=1, max_size=4)), sizes, draw(st.integers(0, 2)), draw(st.booleans())
    )


@few
@given(candidates(CPU))
def test_patches_that_close_are_planned_as_by_the_host(of: Candidates) -> None:
    found, slots, closed = closing(of.text, *of.arguments, of.tables, of.sizes), of.sizes.slots, of.closed()
    assert bool(found.any) == bool(closed)
    for row in range(len(of.arguments[0])):
        own = [range(row * slots, (row + 1) * slots), [row]]
        if row not in closed:
            assert found.begin[row] == found.after[row], "no bytes"
            plans = zip((found.pooling, found.plan), own, strict=True)
            assert not any(seen(plan, query) for plan, queries in plans for query in queries)
            assert not found.plan.page[row] and not found.page[own[0]].any(), "the scratch page"
            continue
        at, position, number = of.rows[row]
        assert (found.begin[row], found.after[row]) == (of.start[at], position + 1)
        for plan, queries, host in zip((found.pooling, found.plan), own, of.planned(row), strict=True):
            assert [seen(plan, query) for query in queries] == [seen(host, query) for query in range(len(queries))]
        host = of.planned(row)[1]
        place = (found.plan.positions[row], found.plan.page[row], found.plan.offset[row])
        assert place == (host.positions[0], host.page[0], host.offset[0])
        latent, (page, offset) = of.pages["latent"][number], divmod(of.patch[at], of.sizes.latent)
        assert found.page[own[0]].tolist() == [latent.pages[page - latent.first]] * slots
        assert found.offset[own[0]].tolist() == [offset * slots + slot for slot in range(slots)]


def tensors(found: Closing) -> list[Tensor]:
    return [value.data if isinstance(value, AttentionPlan) else value for value in found]


@few
@given(candidates(DEVICE))
def test_closing_equals_torch(of: Candidates) -> None:
    how = of.text, *of.arguments, of.tables, of.sizes
    expected, found = closing(*how), closing_triton(*how)
    assert (found.pooling.shape, found.plan.shape) == (expected.pooling.shape, expected.plan.shape)
    for ours, theirs in zip(tensors(found), tensors(expected), strict=True):
        assert torch.equal(ours, theirs)


@few
@given(candidates(DEVICE), SEEDS)
def test_a_row_reads_the_latent_before_its_next_bytes_patch(of: Candidates, seed: int) -> None:
    """Of the patch before that of the byte after it, or of the open one where that was run as if it had ended."""
    draw, slots, size = Draw(seed, DEVICE), of.sizes.slots, of.sizes.latent
    rows = len(of.rows)
    closed = draw.below(2, rows)
    at, _, sequence = (values[:rows] for values in of.arguments)
    # All latents from the first on.
    count = LONGEST // size + 1
    pages = torch.tensor([draw.shuffled(count) for _ in of.floor], device=DEVICE) + 1
    table = PageTable(pages, torch.zeros(len(of.floor), dtype=torch.int64, device=DEVICE))
    how = of.text, at + 1, closed, sequence, table, size, slots
    found = latent_places(*how)
    assert torch.equal(latent_places_triton(*how), found)
    for row, (place, _, number) in enumerate(of.rows):
        own, before = of.patch[place + 1], of.patch[place]
        patch = own if closed[row] and own == before else own - 1
        if patch >= 0:
            assert found[:, row].tolist() == [pages[number, patch // size], patch % size * slots]


@pytest.fixture
def marked() -> Iterator[None]:
    """What is allocated and never written is NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def gated(draw: Draw) -> list[Tensor]:
    """What the kernels of the global stage write."""
    laid = Laid(LAID, draw)
    x, weight, norm = draw.randn(5, 16), Matrix(draw.randn(24, 16)), draw.randn(16)
    caches = [draw.randn(laid.num_pages, 2, laid.page_size, 8) for _ in range(2)]
    with mock.patch.object(attention, "WHOLE", 512):
        attended = TRITON.attention(draw.randn(len(laid.on_device().first), 4, 8), *caches, laid.on_device())
    num_pages, *patches = draw.pooled([3, 1, 2], 4)
    pooled = TRITON.patch_max(draw.randn(num_pages, 4, 8), *patches)
    stored = [torch.full((3, 2, 4, 8), torch.nan, device=DEVICE) for _ in range(4)]
    states, ones = torch.full((3, 4, 16), torch.nan, device=DEVICE), torch.ones(1, dtype=torch.int64, device=DEVICE)
    rope, two = rope_table(8, 100.0, 4, DEVICE), torch.full_like(ones, 2)
    q = TRITON.qkv(x[:1], Matrix(draw.randn(64, 16)), norm, 1e-5, rope, ones, ones, two, *stored[:2])
    of = CrossKvWeights(norm, Matrix(draw.randn(32, 16)), 8, 1e-5)
    TRITON.keys_values(x[:1], of, (stored[2], stored[3]), ones, ones, states)
    product = TRITON.linear(x, weight, norm=norm, eps=1e-5)
    return [product, rms_norm_triton(x, norm, 1e-5), attended, pooled, q, *stored, states]


@pytest.mark.usefixtures("marked")
def test_kernels_write_nothing_under_a_gate_that_is_shut() -> None:
    flag = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    free = gated(Draw(1, DEVICE))
    with gate.under(flag):
        shut = gated(Draw(1, DEVICE))
        flag += 1
        opened = gated(Draw(1, DEVICE))
    for without, written, nothing in zip(free, opened, shut, strict=True):
        assert not without.isnan().all() and nothing.isnan().all()
        torch.testing.assert_close(written, without, rtol=0, atol=0, equal_nan=True)


def test_a_gate_holds_only_within_its_block() -> None:
    shut, x = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.ones(1, 4, device=DEVICE)
    with pytest.raises(ZeroDivisionError), gate.under(shut):
        1 / 0  # noqa: B018
    assert torch.equal(rms_norm_triton(x, x[0], 0.0), x)
