"""Page pools and block tables against a plain model."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.memory.pages import BlockTable, OutOfPages, PagePool

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
        self.kept: list[list[int]] = []

    def free(self) -> int:
        taken = [*(live.values() for live in self.live), *self.kept]
        return NUM_PAGES - 1 - len({page for pages in taken for page in pages})

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
            assert list(table.pages) == [live[p] for p in sorted(live)]
            assert table.first == floor

    @rule(i=TABLES)
    def keep(self, i: int) -> None:
        """As the prefix cache does behind a block."""
        if pages := list(self.tables[i].pages):
            self.pool.keep(pages)
            self.kept.append(pages)

    @rule()
    def forget(self) -> None:
        if self.kept:
            self.pool.forget(self.kept.pop(0))

    @rule(i=TABLES, rows=ROWS)
    def begin_with_pages_of_others(self, i: int, rows: int) -> None:
        """A page that is not full becomes the table's own before it is written."""
        table = self.tables[i]
        if not self.kept or table.pages or self.floor[i]:
            return
        shared = self.kept[-1]
        table.borrow(0, shared, end := min(rows, len(shared) * PAGE_SIZE))
        partial = end % PAGE_SIZE > 0
        assert table.missing(end) == partial
        if partial and not self.pool.can_take(1):
            with pytest.raises(OutOfPages):
                table.own()
            table.release()
            return
        copied = table.own()
        assert (copied is not None) == partial and table.own() is None
        if copied:
            assert copied[0] == shared[-1] and copied[1] not in shared and table.pages[-1] == copied[1]
        assert list(table.pages[:-1]) == shared[:-1]
        self.live[i] = dict(enumerate(table.pages))

    @invariant()
    def no_page_is_lost_or_scratch_or_written_by_two(self) -> None:
        held = {page for table in self.tables for page in table.pages}
        idle = {page for pages in self.kept for page in pages} - held
        assert all(1 <= page < NUM_PAGES for page in held | idle)
        assert (self.pool.num_used, self.pool.num_idle) == (len(held), len(idle))
        assert self.pool.num_free == NUM_PAGES - 1 - len(held | idle)
        self.pool.check_integrity()

    def teardown(self) -> None:
        for table in self.tables:
            table.release()
        assert self.pool.num_used == 0
        while self.kept:
            self.forget()
        assert sorted(self.pool.take(NUM_PAGES - 1)) == list(range(1, NUM_PAGES))


SeveralTablesOnOnePool.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestSeveralTablesOnOnePool = SeveralTablesOnOnePool.TestCase


def test_a_page_pool_refuses_to_free_pages_not_in_use_and_frees_none() -> None:
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


def test_the_page_freed_last_is_taken_first() -> None:
    pool = PagePool("test", 9)
    pages = pool.take(4)
    pool.give_back([pages[1]])
    pool.give_back([pages[3]])
    assert pool.take(2) == [pages[3], pages[1]]


def test_taking_pages_is_all_or_nothing() -> None:
    pool = PagePool("test", 4)
    with pytest.raises(OutOfPages, match="'test'"):
        pool.take(4)
    assert pool.num_free == 3


def test_the_integrity_check_detects_a_corrupted_page_pool() -> None:
    pool = PagePool("test", 4)
    pool.take(1)
    pool._free.pop()
    with pytest.raises(RuntimeError):
        pool.check_integrity()
