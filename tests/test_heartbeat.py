"""Which steps the heart calls too long."""

import math
import os
import time
from pathlib import Path
from typing import Any

import pytest

from engine.costs.latency import MOST_CALLED
from engine.process.heartbeat import ALIVE, STUCK, TIMES, Heart
from engine.step import graphs
from tests.engines import make_engine, request
from tests.models import text


@pytest.mark.parametrize(
    ("least", "expected", "told"), [(0.1, 0.0, STUCK), (0.1, 1 / TIMES, ALIVE), (1.0, 0.0, ALIVE), (0.1, 0.004, STUCK)]
)
def test_a_step_may_take_twenty_times_what_it_should(
    monkeypatch: pytest.MonkeyPatch, least: float, expected: float, told: bytes
) -> None:
    monkeypatch.setattr("engine.process.heartbeat.BEAT_SECONDS", 0.02)
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb", buffering=0) as beats:
        heart = Heart(writing, least)
        heart.step(lambda: time.sleep(0.3), lambda: expected)
        assert (STUCK in beats.read(4096)) == (told == STUCK)


def test_an_engine_tells_how_long_its_step_should_take(tiny: Path) -> None:
    """More for a step of more rows; and not less than it takes by far."""
    engine = make_engine(tiny)
    engine.calibrate()
    told = []
    for length in (8, 400):
        engine.add(request("a", text(length, 1, specials=False), 1))
        began = time.perf_counter()
        while engine.has_work:
            engine.step()
        told.append(engine.step_bound())
        assert 0 < (time.perf_counter() - began) < 20 * told[-1] < 60
    assert told[1] > told[0]


def test_a_step_of_a_long_answer_is_not_expected_to_make_all_of_it(tiny: Path) -> None:
    engine, told = make_engine(tiny), []
    engine.calibrate()
    for count in (MOST_CALLED, 1000):
        engine.add(request(str(count), text(8, 1, specials=False), count, decoder="blt"))
        engine.step()
        engine.ledger.latency.whole_step = lambda rows, passes: told.append(passes) or 0.0  # type: ignore
        engine.step_bound()
        engine.abort(str(count))
    assert told == [MOST_CALLED + 1] * 2


def test_a_step_that_records_is_given_the_time_for_it(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording begins with compiling kernels, which takes as long as it takes."""
    engine, told = make_engine(tiny, graphs=True), []

    class Slow(graphs._Recording):
        def __init__(self, *args: Any) -> None:
            time.sleep(0.05)
            told.append(engine.step_bound())
            super().__init__(*args)

    monkeypatch.setattr(graphs, "_Recording", Slow)
    engine.add(request("a", text(8, 1), 4))
    engine.step()
    assert told and all(seconds == math.inf for seconds in told)
    assert 0.05 * len(told) <= engine.step_bound() < math.inf
    count = len(told)
    while engine.has_work:
        engine.step()
        if len(told) == count:
            assert engine.step_bound() < 0.05, "what was recorded in an earlier step is not counted"
        count = len(told)
