"""Who gets pages: a reservation takes all or nothing."""

from pathlib import Path
from typing import Any

import pytest

from engine.engine import Engine
from engine.memory.memory import Memory, Reach
from engine.rows import Rows
from engine.sequence import Sequence
from tests.engines import crowded_engine, request, run, save_ours
from tests.models import our_config, our_model, text

LENGTH = 1000
"""More rows than the caches hold at once."""
LONGEST = 300


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """Its caches hold little more than one sequence, and a prefix is kept of one that has ended."""
    model = save_ours(tmp_path / "model", our_model(our_config(), 3))
    made = crowded_engine(model, max_length=LONGEST, max_sequences=1)
    run(made, [request("known", text(200, 1), 1)])
    assert any(pool.num_idle for pool in made.memory.caches.pools.values())
    return made


def sequence(engine: Engine, arrival: int, length: int) -> Sequence:
    asked = request(str(arrival), text(length, arrival + 7), 1)
    return Sequence(asked, arrival, engine.memory.caches.new_tables())


def state(memory: Memory) -> dict[str, Any]:
    return {name: (pool.num_free, pool.num_idle, pool.num_used) for name, pool in memory.caches.pools.items()}


def longest_that_fits(engine: Engine, arrival: int) -> int:
    made = sequence(engine, arrival, LENGTH)
    tables = [(table, engine.memory.caches.pools[name]) for name, table in made.tables.items()]

    def fits(end: int) -> bool:
        return all(table.missing(end) <= pool.num_free + pool.num_idle for table, pool in tables)

    return max(filter(fits, range(1, LENGTH + 1)))


def test_rows_that_do_not_fit_forget_no_prefix(engine: Engine) -> None:
    before = state(engine.memory)
    end = longest_that_fits(engine, 1)
    assert not engine.memory.reserve(Rows.prefill(sequence(engine, 1, LENGTH), end + 1))
    assert state(engine.memory) == before
    rows = Rows.prefill(sequence(engine, 1, LENGTH), end)
    # Undecided bytes may each close a patch, so it is the global cache that is full first.
    missing, pool = rows.sequence.tables["global"].missing(end), engine.memory.caches.pools["global"]
    assert pool.num_free < missing <= pool.num_free + pool.num_idle, "some of the pages are a prefix's"
    assert engine.memory.reserve(rows)
    idle = sum(pool.num_idle for pool in engine.memory.caches.pools.values())
    assert idle < sum(idle for _, idle, _ in before.values()), "and now they are not"
    engine.memory.release(rows.sequence)
    engine.memory.caches.check_integrity()


def test_a_reservation_for_several_sequences_takes_all_or_nothing(engine: Engine) -> None:
    end = longest_that_fits(engine, 1)
    one, other = sequence(engine, 1, LENGTH), sequence(engine, 2, LENGTH)
    before = state(engine.memory)
    assert not engine.memory.reserve_all([Reach(one, end, end), Reach(other, end, end)])
    assert state(engine.memory) == before, "nothing was taken, and no prefix forgotten"
    assert engine.memory.reserve_all([Reach(one, 4, 4), Reach(other, 4, 4)])
    assert all(len(table.pages) for table in (one.tables["encoder"], other.tables["encoder"]))
    for each in (one, other):
        engine.memory.release(each)
    engine.memory.caches.check_integrity()


def test_rows_that_do_not_fit_are_not_reserved_in_part(engine: Engine) -> None:
    end = longest_that_fits(engine, 1)
    whole = Rows.prefill(sequence(engine, 1, LENGTH), end)
    assert engine.memory.reserve(whole)
    more = Rows.prefill(sequence(engine, 2, LENGTH), end)
    assert not engine.memory.reserve(more)
    assert not any(table.pages for table in more.sequence.tables.values())
    assert not engine.memory.reserve_all([Reach(more.sequence, LONGEST, LONGEST + 1)]), "beyond the longest text"


def test_reset_drops_all_requests_and_frees_their_pages(engine: Engine) -> None:
    engine.add(request("dropped", text(50, 9), 40))
    engine.step()
    assert engine.has_work and any(pool.num_used for pool in engine.memory.caches.pools.values())
    engine.reset()
    assert not engine.has_work
    assert not any(pool.num_used for pool in engine.memory.caches.pools.values())
    assert run(engine, [request("dropped", text(50, 9), 4)])["dropped"].ids
