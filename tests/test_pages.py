"""Page pools and block tables against a plain model."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.pages import BlockTable, OutOfPages, PagePool

NUM_PAGES, PAGE_SIZE, NUM_TABLES = 9, 4, 3
TABLES, ROWS = st.integers(0, NUM_TABLES - 1), st.integers(0, 60)


class SeveralTablesOnOnePool(RuleBasedStateMachine):
    """The model knows, per table, which absolute pages are live and from where rows may still come."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool("test", NUM_PAGES)
        self.tables = [BlockTable(self.pool, PAGE_SIZE) for _ in range(NUM_TABLES)]
        self.live: list[dict[int, int]] = [{} for _ in range(NUM_TABLES)]
        self.floor = [0] * NUM_TABLES

    def free(self) -> int:
        return NUM_PAGES - 1 - sum(len(live) for live in self.live)

    @rule(i=TABLES, end=ROWS)
    def extend(self, i: int, end: int) -> None:
        table, live = self.tables[i], self.live[i]
        wanted = [p for p in range(self.floor[i], 99) if p * PAGE_SIZE < end and p not in live]
        assert table.missing(end) == len(wanted)
        assert self.pool.can_take(len(wanted)) == (len(wanted) <= self.free())
        if len(wanted) > self.free():
            with pytest.raises(OutOfPages):
                table.extend(end)
        else:
            table.extend(end)
            live |= {p: table.pages[p - table.first] for p in wanted}

    @rule(i=TABLES, row=ROWS)
    def trim_before(self, i: int, row: int) -> None:
        self.tables[i].trim_before(row)
        self.floor[i] = max(self.floor[i], row // PAGE_SIZE)
        self.live[i] = {p: page for p, page in self.live[i].items() if (p + 1) * PAGE_SIZE > row}

    @rule(i=TABLES, end=ROWS)
    def cut(self, i: int, end: int) -> None:
        self.tables[i].cut(end)
        self.live[i] = {p: page for p, page in self.live[i].items() if p * PAGE_SIZE < end}

    @rule(i=TABLES)
    def release(self, i: int) -> None:
        self.tables[i].release()
        self.live[i], self.floor[i] = {}, 0

    @invariant()
    def tables_hold_what_the_model_holds(self) -> None:
        for table, live, floor in zip(self.tables, self.live, self.floor, strict=True):
            assert table.pages == [live[p] for p in sorted(live)]
            assert table.first == floor
            for row in range(70):
                if row // PAGE_SIZE in live:
                    assert table.slot(row) == live[row // PAGE_SIZE] * PAGE_SIZE + row % PAGE_SIZE
                else:
                    with pytest.raises(IndexError):
                        table.slot(row)

    @invariant()
    def no_page_is_lost_shared_or_scratch(self) -> None:
        held = [page for table in self.tables for page in table.pages]
        assert len(set(held)) == len(held)
        assert all(1 <= page < NUM_PAGES for page in held)
        assert (self.pool.num_used, self.pool.num_free) == (len(held), NUM_PAGES - 1 - len(held))
        self.pool.check_integrity()

    def teardown(self) -> None:
        for table in self.tables:
            table.release()
        assert self.pool.num_used == 0
        assert sorted(self.pool.take(NUM_PAGES - 1)) == list(range(1, NUM_PAGES))


SeveralTablesOnOnePool.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestSeveralTablesOnOnePool = SeveralTablesOnOnePool.TestCase


def test_a_pool_refuses_pages_that_are_not_in_use_and_frees_none_of_them() -> None:
    pool = PagePool("test", 5)
    a, b = pool.take(2)
    free = next(page for page in range(1, 5) if page not in (a, b))
    for pages in ([a, free], [a, 0], [a, 5], [a, -1], [a, a]):
        with pytest.raises(ValueError):
            pool.give_back(pages)
        assert pool.num_used == 2
    pool.give_back([a, b])
    with pytest.raises(ValueError):
        pool.give_back([a])
    assert pool.num_used == 0


def test_the_page_given_back_last_is_taken_first() -> None:
    pool = PagePool("test", 9)
    pages = pool.take(4)
    pool.give_back([pages[1]])
    pool.give_back([pages[3]])
    assert pool.take(2) == [pages[3], pages[1]]


def test_taking_is_all_or_nothing() -> None:
    pool = PagePool("test", 4)
    with pytest.raises(OutOfPages, match="'test'"):
        pool.take(4)
    assert pool.num_free == 3


def test_the_integrity_check_sees_a_corrupted_pool() -> None:
    pool = PagePool("test", 4)
    pool.take(1)
    pool._free.pop()
    with pytest.raises(RuntimeError):
        pool.check_integrity()
