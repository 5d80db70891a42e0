"""The scheduler alone: integers, a pretended memory, no model."""

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.decoders import Decoder, Result
from engine.decoders.blt_d import Diffusion
from engine.decoders.blt_dv import Verified
from engine.decoders.blt_s import Draft
from engine.scheduler import Part, Scheduler
from engine.sequence import Sequence
from engine.types import Request, Unmask


class Memory:
    """Pages of one row each; a sequence holds as many as it has rows."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.held: dict[int, int] = {}

    def can_reserve(self, part: Part) -> bool:
        others = sum(rows for arrival, rows in self.held.items() if arrival != part.sequence.arrival)
        return others + part.reach <= self.total

    def reserve(self, part: Part) -> None:
        assert self.can_reserve(part)
        self.held[part.sequence.arrival] = part.reach

    def release(self, sequence: Sequence) -> None:
        self.held.pop(sequence.arrival, None)

    def attach(self, sequence: Sequence) -> None:
        assert sequence.num_computed == 0

    def room(self, sequence: Sequence) -> int:
        return 1 << 30


def sequence(arrival: int, prompt: int, output: int, priority: int = 0, decoder: Decoder | None = None) -> Sequence:
    fields = {"request_id": f"of-{arrival}"}
    request = Request(id=str(arrival), prompt_ids=[5] * prompt, max_tokens=output, priority=priority, log_fields=fields)
    return Sequence(request, arrival, {}, decoder, mask_id=260)


def run_step(scheduler: Scheduler) -> list[Part]:
    """What the engine does with a schedule, without a model: every draft is right but for its last byte."""
    step = scheduler.schedule()
    for part in step:
        advance(scheduler, part)
    return step


def advance(scheduler: Scheduler, part: Part) -> None:
    s, call = part.sequence, part.call
    if call is None:
        s.num_computed = part.end
        assert s.remaining > 0
        return
    verifies = call.runs_clean and call.drafts
    cells = [5] * len(call.block)
    if verifies:
        first = max(s.num_computed, call.decoded)
        result = Result(first, [*[5] * (part.end - first - 2), 6, 6][: part.end - first], max(part.end - first - 2, 0))
    else:
        s.num_computed = part.end
        result = Result(part.end - 1, [5] * (call.wants + len(call.causal)), 0, cells, [0] * len(cells))
    if (outcome := s.resume(result)) is None:
        return
    assert outcome.ids
    if verifies:
        s.num_computed += len(outcome.ids)
    for token in outcome.ids:
        s.append(token)
        if s.num_output == s.request.max_tokens:
            scheduler.remove(s)
            return
    assert s.remaining >= 1


DECODERS: list[Decoder | None] = [
    None,
    Draft(3),
    Diffusion(4, Unmask(rule="confidence"), finish_patch=False),
    Verified(4, Unmask(rule="one_step")),
]
LONGEST = 10
"""More rows than a call of these has."""

jobs = st.lists(
    st.tuples(
        st.integers(1, 40), st.integers(1, 12), st.integers(-2, 2), st.integers(0, 30), st.sampled_from(range(4))
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(jobs=jobs, budget=st.integers(1, 30), most=st.integers(1, 6), total=st.integers(60, 120))
def test_everything_finishes_within_the_budgets(
    jobs: list[tuple[int, int, int, int, int]], budget: int, most: int, total: int
) -> None:
    memory = Memory(total)
    scheduler = Scheduler(memory, max_sequences=most, max_step_rows=budget)
    pending = [
        (at, sequence(i, prompt, output, priority, DECODERS[decoder]))
        for i, (prompt, output, priority, at, decoder) in enumerate(jobs)
    ]
    started = {s.arrival for _, s in pending}
    idle = 0
    steps = 0
    while pending or scheduler.waiting or scheduler.running:
        for at, s in list(pending):
            if at <= steps:
                scheduler.add(s)
                pending.remove((at, s))
        alive = bool(scheduler.waiting or scheduler.running)
        first = scheduler.running[0] if scheduler.running else None
        before = first and (first.num_computed, first.num_output)
        step = run_step(scheduler)
        steps += 1
        assert sum(rows for rows in memory.held.values()) <= total
        assert len(scheduler.running) <= most
        assert len({part.sequence.arrival for part in step}) == len(step)
        assert bool(step) == alive
        if first is not None and budget >= most * LONGEST:
            # A draft's passes before the last leave no trace.
            idle = idle + 1 if (first.num_computed, first.num_output) == before else 0
            assert idle < LONGEST, "the first in the order always moves on"
        assert steps < 5000, "starved"
    assert not memory.held
    assert started == set(range(len(jobs)))


def test_a_step_spends_at_most_its_rows_and_generating_sequences_come_first() -> None:
    scheduler = Scheduler(Memory(10_000), max_sequences=8, max_step_rows=16)
    talking = [sequence(i, 1, 100) for i in range(4)]
    for s in talking:
        scheduler.add(s)
    run_step(scheduler)
    scheduler.add(sequence(9, 100, 1))
    for _ in range(3):
        step = scheduler.schedule()
        assert {part.sequence.arrival: part.num_rows for part in step} == {0: 1, 1: 1, 2: 1, 3: 1, 9: 12}
        for part in step:
            advance(scheduler, part)


def test_the_youngest_is_preempted_and_goes_on_later(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "fastblt")
    memory = Memory(30)
    scheduler = Scheduler(memory, max_sequences=4, max_step_rows=64)
    old, young = sequence(0, 10, 15), sequence(1, 10, 15)
    scheduler.add(old)
    scheduler.add(young)
    while scheduler.running or scheduler.waiting:
        run_step(scheduler)
        assert old.preemptions == 0
    assert young.preemptions > 0
    assert [record.request_id for record in caplog.records] == ["of-1"] * young.preemptions  # type: ignore[attr-defined]
    assert old.num_output == young.num_output == 15
    assert not memory.held


def test_a_lower_priority_value_goes_first() -> None:
    scheduler = Scheduler(Memory(100), max_sequences=1, max_step_rows=64)
    late = sequence(1, 5, 1, priority=-1)
    scheduler.add(sequence(0, 5, 1))
    scheduler.add(late)
    assert [part.sequence for part in scheduler.schedule()] == [late]
