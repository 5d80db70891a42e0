"""Plans of attention: in C and in Python the same numbers, and those mean what `AttentionPlan` says."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.memory.pages import BlockTable, PagePool
from kernels import native, planning
from kernels.attention import AttentionPlan, PlanShape
from kernels.planning import Lengths, Spans, Tiling


class Drawn(NamedTuple):
    """Spans, and what is known of each of their rows: its sequence's table, its position, the rows that it sees."""

    spans: Spans
    tables: list[BlockTable]
    positions: list[int]
    first: list[int]
    last: list[int]
    tiling: Tiling


@st.composite
def drawn_spans(draw: st.DrawFn) -> Drawn:
    page_size = draw(st.sampled_from([1, 4, 16]))
    window = draw(st.sampled_from([0, 1, 7, 33]))
    small = draw(st.integers(1, 8))
    tiling = Tiling(small, small * draw(st.integers(1, 3)), page_size, window)
    pool = PagePool("test", 4000)
    drawn = Drawn(Spans(), [], [], [], [], tiling)
    for _ in range(draw(st.integers(0, 4))):
        start, count = draw(st.integers(0, 300)), draw(st.integers(1, 40))
        floor, mutual = draw(st.integers(0, start)), draw(st.integers(0, count))
        end = start + count
        first = [max(row - window + 1, floor) if window else floor for row in range(start, end)]
        table = BlockTable(pool, page_size)
        table.extend(end)
        table.trim_before(first[0])
        drawn.spans.add(table.pages, table.first, start, count, floor, mutual, end - 1)
        drawn.tables.extend([table] * count)
        drawn.positions.extend(range(start, end))
        drawn.first.extend(first)
        drawn.last.extend([*range(start, end - mutual), *[end - 1] * mutual])
    return drawn


@st.composite
def lengths_for(draw: st.DrawFn, drawn: Drawn) -> Lengths:
    rows = drawn.spans.num_rows + draw(st.sampled_from([0, 0, 1, 50]))
    # A stage of so many rows has at most so many tiles.
    return Lengths(rows, rows, draw(st.sampled_from([0, rows])), draw(st.sampled_from([0, 1, 64])))


@given(st.data())
def test_an_attention_plan_writes_each_row_to_its_page_and_reads_its_context(data: st.DataObject) -> None:
    drawn = data.draw(drawn_spans())
    lengths = data.draw(lengths_for(drawn))
    numbers, shape = planning.plan(drawn.spans, drawn.spans, drawn.tiling, lengths)
    assert len(numbers) == sum(shape.sizes)
    plan = AttentionPlan(torch.from_numpy(numbers), shape, page_size=drawn.tiling.page_size)
    n, size = drawn.spans.num_rows, drawn.tiling.page_size
    for table, position, page, offset in zip(drawn.tables, plan.positions, plan.page, plan.offset, strict=False):
        block, place = divmod(int(position), size)
        assert (page, offset) == (table.pages[block - table.first], place)
    assert plan.positions.tolist() == drawn.positions + [0] * (lengths.rows - n)
    assert not plan.page[n:].any(), "padding is written to the scratch page"
    assert (plan.first[:n].tolist(), plan.last[:n].tolist()) == (drawn.first, drawn.last)

    covered = []
    most_pages = 1
    for begin, count, pages_at, first_page, num_pages in plan.tiles.tolist():
        covered += range(begin, begin + count)
        for query in range(begin, begin + count if num_pages else begin):
            assert drawn.tables[query] is drawn.tables[begin], "a tile is of one sequence"
            for row in (drawn.first[query], drawn.last[query]):
                seen = plan.pages[pages_at + row // size - first_page]
                assert seen == drawn.tables[query].pages[row // size - drawn.tables[query].first]
                assert first_page <= row // size < first_page + num_pages
        most_pages = max(most_pages, num_pages)
    assert covered == list(range(lengths.queries)), "each query is in one tile"
    assert shape.most_pages == most_pages
    if lengths.pages:
        assert shape.pages >= lengths.pages and shape.pages & (shape.pages - 1) == 0


@pytest.mark.skipif(not native.LIBRARY, reason="the C kernels are not compiled")
@given(st.data())
def test_the_c_planner_equals_the_python_planner(data: st.DataObject) -> None:
    writes, queries = data.draw(drawn_spans()), data.draw(drawn_spans())
    for drawn, other in ((queries, queries), (queries, writes)):
        # What is written may be other rows than those that see, or none: of the same cache, pages of the same size.
        other = other if other.tiling.page_size == drawn.tiling.page_size else drawn._replace(spans=Spans())
        lengths = data.draw(lengths_for(drawn))._replace(rows=other.spans.num_rows + data.draw(st.integers(0, 3)))
        expected, expected_shape = planning.plan(other.spans, drawn.spans, drawn.tiling, lengths)
        found, shape = native.plan(other.spans, drawn.spans, drawn.tiling, lengths)
        assert shape == expected_shape and found.tolist() == expected.tolist()


@pytest.mark.skipif(not native.LIBRARY, reason="the C kernels are not compiled")
def test_an_attention_plan_may_be_larger_than_all_earlier_plans() -> None:
    table = BlockTable(PagePool("test", 20_000), 1)
    table.extend(10_000)
    spans = Spans()
    spans.add(table.pages, 0, 0, 10_000, 0)
    tiling, lengths = Tiling(16, 32, 1, 0), Lengths(10_000, 10_000)
    found, shape = native.plan(spans, spans, tiling, lengths)
    expected, expected_shape = planning.plan(spans, spans, tiling, lengths)
    assert isinstance(shape, PlanShape) and shape == expected_shape and found.tolist() == expected.tolist()
