"""The scheduler alone: integers, a pretended memory, no model; where time matters, it is what rows are said to cost."""

import logging
from copy import copy
from itertools import count
from math import ceil
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import scheduler as scheduling
from engine import waiting
from engine.costs.calibration import LEAST_PROMPT_ROWS, MEASURED_ROWS, MeasuredStep, prompt_rows
from engine.decoders import Decoder, Result, Unmask, Verify
from engine.decoders.blt_d import BlockDiffusion
from engine.decoders.blt_dv import VerifiedDiffusion
from engine.decoders.blt_s import SelfSpeculation
from engine.rows import Rows
from engine.scheduler import MOST_ATTACHED, MOST_PRIORITY, PROMPT_SHARE, STEPS_PER_PRIORITY, Scheduler
from engine.sequence import Sequence
from engine.types import MAX_DRAFT, Request, UnmaskRule


class Memory:
    """Pages of one row each; a sequence holds as many as it has rows."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.held: dict[int, int] = {}

    def reserve(self, rows: Rows) -> bool:
        others = sum(held for arrival, held in self.held.items() if arrival != rows.sequence.arrival)
        fits = others + rows.reach <= self.total
        if fits:
            self.held[rows.sequence.arrival] = rows.reach
        return fits

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


def run_step(scheduler: Scheduler) -> list[Rows]:
    """What the engine does with a schedule, without a model: every draft is right but for its last byte."""
    generating = {s.arrival for s in scheduler.running if s.remaining <= (MAX_DRAFT if s.num_output else 1)}
    step = scheduler.schedule()
    # An ask is not cut: the last one may go beyond.
    assert sum(part.num_rows for part in step[:-1]) < scheduler.max_step_rows
    prompts = [part for part in step if part.sequence.arrival not in generating]
    assert sum(part.num_rows for part in prompts[:-1]) < scheduler.max_prompt_rows
    for part in step:
        advance(scheduler, part)
    return step


def advance(scheduler: Scheduler, rows: Rows) -> None:
    s, ask = rows.sequence, rows.ask
    if ask is None:
        s.advance(rows.end)
        assert s.remaining > 0
        return
    match ask:
        case Verify(drafts):
            result = Result([6], accepted=len(drafts) - 1)
        case Unmask(block):
            result = Result([5] * len(block), settled=[0] * len(block))
        case _:
            result = Result([5])
    if not isinstance(ask, Verify):
        s.advance(rows.end)
    if (outcome := s.resume(result)) is None:
        return
    assert outcome.ids
    if isinstance(ask, Verify):
        s.advance(s.num_computed + len(outcome.ids))
    for token in outcome.ids:
        s.append([token])
        if s.num_output == s.request.max_tokens:
            scheduler.remove(s)
            return
    assert s.remaining >= 1


DECODERS: list[Decoder | None] = [
    None,
    SelfSpeculation(3),
    BlockDiffusion(4, UnmaskRule(rule="confidence"), finish_patch=False),
    VerifiedDiffusion(4, UnmaskRule(rule="one_step")),
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


@settings(max_examples=150)
@given(
    jobs=jobs, budget=st.integers(1, 30), prompts=st.integers(1, 30), most=st.integers(1, 6), total=st.integers(60, 120)
)
def test_every_sequence_finishes_within_the_budgets(
    jobs: list[tuple[int, int, int, int, int]], budget: int, prompts: int, most: int, total: int
) -> None:
    memory = Memory(total)
    scheduler = Scheduler(memory, max_sequences=most, max_step_rows=budget, max_prompt_rows=prompts)
    pending = [
        (at, sequence(i, prompt, output, priority, DECODERS[decoder]))
        for i, (prompt, output, priority, at, decoder) in enumerate(jobs)
    ]
    everyone = [s for _, s in pending]
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
    assert all(s.num_output == s.request.max_tokens for s in everyone)


def test_a_step_keeps_its_row_budget_and_serves_generating_sequences_first() -> None:
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


def test_the_youngest_sequence_is_preempted_and_resumed(caplog: pytest.LogCaptureFixture) -> None:
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


@pytest.mark.parametrize(("cached", "each"), [(100, 32), (MOST_ATTACHED // 4 + 1, 4), (MOST_ATTACHED + 1, 1)])
def test_a_step_attaches_a_bounded_number_of_cached_ids_and_the_next_ones_the_others(cached: int, each: int) -> None:
    class Prefixes(Memory):
        def attach(self, sequence: Sequence) -> None:
            super().attach(sequence)
            sequence.advance(cached)

    scheduler = Scheduler(Prefixes(1 << 30), max_sequences=64, max_step_rows=512)
    for arrival in range(32):
        scheduler.add(sequence(arrival, cached + 1, 99))
    for begun in range(0, 32, each):
        step = [part.sequence.arrival for part in run_step(scheduler)]
        assert sorted(step[:begun]) == [*range(begun)], "those that generate run, too"
        assert step[begun:] == [*range(begun, begun + each)]


def test_waiting_raises_the_priority_of_a_sequence() -> None:
    scheduler = Scheduler(Memory(2000), max_sequences=1, max_step_rows=64)
    scheduler.add(sequence(0, 1, STEPS_PER_PRIORITY + 9))
    patient = sequence(1, 5, 1, priority=3)
    scheduler.add(patient)
    for _ in range(STEPS_PER_PRIORITY + 1):
        run_step(scheduler)
    urgent, late = sequence(2, 5, 1, priority=1), sequence(3, 5, 1, priority=2)
    scheduler.add(late)
    scheduler.add(urgent)
    assert list(scheduler.waiting) == [urgent, patient, late]


@settings(max_examples=50)
@given(
    priorities=st.lists(st.integers(-200, 200) | st.sampled_from([-(2**31), 2**31 - 1]), min_size=1, max_size=10),
    data=st.data(),
)
def test_sequences_added_together_start_by_priority_then_arrival(priorities: list[int], data: st.DataObject) -> None:
    scheduler = Scheduler(Memory(1000), max_sequences=1, max_step_rows=16)
    for arrival, priority in enumerate(priorities):
        scheduler.add(sequence(arrival, data.draw(st.integers(1, 40)), 1, priority))
    begun: dict[int, None] = {}
    while scheduler.running or scheduler.waiting:
        begun |= {part.sequence.arrival: None for part in run_step(scheduler)}
    clipped = [min(max(priority, -MOST_PRIORITY), MOST_PRIORITY) for priority in priorities]
    assert list(begun) == sorted(range(len(priorities)), key=lambda i: (clipped[i], i))


def test_a_short_prompt_does_not_overtake_one_of_a_better_priority() -> None:
    scheduler = Scheduler(Memory(1000), max_sequences=8, max_step_rows=16)
    urgent, short = sequence(0, 100, 1, priority=-1), sequence(1, 4, 1)
    scheduler.add(urgent)
    run_step(scheduler)
    scheduler.add(short)
    while urgent.remaining > 16:
        run_step(scheduler)
        assert not short.num_computed


LONG, OUTPUT = 60, 6
"""Most rows of a prompt and of an output in an endless stream."""


@settings(max_examples=30)
@given(
    most=st.integers(1, 6),
    queue=st.integers(1, 6),
    rows=st.sampled_from((4, 16, 2 * LONG)),
    worse=st.integers(0, 3),
    longest=st.sampled_from((4, LONG)),
    total=st.sampled_from((LONG + OUTPUT + LONGEST, 300)),
    draw=st.randoms(use_true_random=False),
)
def test_an_endless_stream_of_better_priorities_starves_no_sequence(
    most: int, queue: int, rows: int, worse: int, longest: int, total: int, draw: Random
) -> None:
    scheduler = Scheduler(Memory(total), max_sequences=most, max_step_rows=most * LONGEST, max_prompt_rows=rows)
    arrivals = count(1)
    last = sequence(0, LONG, OUTPUT, priority=worse)
    for _ in range(queue):
        scheduler.add(sequence(next(arrivals), draw.randint(1, longest), draw.randint(1, OUTPUT)))
        run_step(scheduler)
    scheduler.add(last)
    steps = 0
    while last.num_output < OUTPUT:
        while len(scheduler.waiting) < queue:
            scheduler.add(sequence(next(arrivals), draw.randint(1, longest), draw.randint(1, OUTPUT)))
        run_step(scheduler)
        steps += 1
        # Then no new sequence goes before it; those already there are soon done, each in turn the first of all.
        alone = 2 * ceil((LONG + OUTPUT) / rows) + OUTPUT + 1
        assert steps <= worse * STEPS_PER_PRIORITY + (most + queue + 1) * alone


@settings(max_examples=50)
@given(
    rows=st.integers(8, 64),
    shorts=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 100)), min_size=1, max_size=8),
)
def test_short_and_long_prompts_do_not_block_each_other(rows: int, shorts: list[tuple[int, int]]) -> None:
    scheduler = Scheduler(Memory(10_000), max_sequences=16, max_step_rows=256, max_prompt_rows=rows)
    long = sequence(0, 2000, 1)
    scheduler.add(sequence(100, 1, 500))
    scheduler.add(long)
    due = {sequence(i, length, 1): at for i, (at, length) in enumerate(shorts, 1)}
    before = 2 * ceil(sum(length for _, length in shorts) / rows) + 2 * len(shorts)
    steps = 0
    while not long.num_output:
        for s in [s for s, at in due.items() if at == steps]:
            scheduler.add(s)
        run_step(scheduler)
        steps += 1
        assert all(s.num_output for s, at in due.items() if steps > at + before)
        assert steps <= 2 * ceil(2000 / rows) + 2


def test_a_short_prompt_leaves_the_last_slot_to_the_first_waiting_sequence() -> None:
    scheduler = Scheduler(Memory(1000), max_sequences=3, max_step_rows=16)
    running, first, short, also = sequence(0, 100, 50), sequence(1, 90, 1), sequence(2, 20, 90), sequence(3, 30, 1)
    for s in (running, first, short, also):
        scheduler.add(s)
    for _ in range(4):
        run_step(scheduler)
        assert {first, also} <= set(scheduler.waiting)
    assert scheduler.running == [running, short]
    while running.remaining > 1:
        run_step(scheduler)
    run_step(scheduler)
    assert scheduler.running == [running, first, short]


def test_short_prompts_leave_scarce_pages_to_the_first_waiting_sequence() -> None:
    scheduler = Scheduler(Memory(100), max_sequences=8, max_step_rows=64, max_prompt_rows=12)
    talking, first = sequence(0, 1, 95), sequence(1, 40, 1)
    scheduler.add(talking)
    while talking.num_output < 91:
        run_step(scheduler)
    scheduler.add(first)
    for arrival in range(2, 5):
        scheduler.add(sequence(arrival, 4, 1))
    while talking.num_output < 95:
        assert [part.sequence for part in run_step(scheduler)] == [talking]
    assert [part.sequence for part in run_step(scheduler)] == [first]


small = st.floats(0.0, 0.01)


@settings(max_examples=50)
@given(
    fixed=st.floats(0.001, 0.1),
    per_row=small,
    late=small,
    stall=st.floats(0.0, 0.2),
    prompts=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 800)), min_size=1, max_size=6),
)
def test_prompt_rows_stall_streams_no_longer_than_allowed(
    fixed: float, per_row: float, late: float, stall: float, prompts: list[tuple[int, int]]
) -> None:
    def seconds(rows: int) -> float:
        """What a step takes; rows cost more where they are many."""
        return fixed + per_row * rows + late * max(rows - 16, 0)

    tried = [MeasuredStep(rows, {"decoder": (rows, seconds(rows))}) for rows in MEASURED_ROWS]
    chosen = prompt_rows(tried, stall, most=512)
    allowed = max(stall, seconds(1)) + 1e-9
    assert chosen == LEAST_PROMPT_ROWS or seconds(1 + chosen) - seconds(1) <= allowed
    assert chosen == 512 or seconds(2 + chosen) - seconds(1) > 0.999 * allowed, "and no shorter than they need to be"
    scheduler = Scheduler(Memory(100_000), max_sequences=16, max_step_rows=512, max_prompt_rows=chosen)
    stream = sequence(0, 1, 400)
    scheduler.add(stream)
    run_step(scheduler)
    due = [(at, sequence(i, length, 1)) for i, (at, length) in enumerate(prompts, 1)]
    for at in range(60):
        for s in [s for when, s in due if when == at]:
            scheduler.add(s)
        step = scheduler.schedule()
        rows = sum(part.num_rows for part in step if part.sequence.remaining > 1)
        assert stream in [part.sequence for part in step]
        assert rows <= LEAST_PROMPT_ROWS or seconds(1 + rows) - seconds(1) <= allowed
        for part in step:
            advance(scheduler, part)


@given(st.integers(2, 20), st.integers(1, 16), st.integers(1, 40))
def test_rounds_that_do_not_fit_into_a_step_run_first_in_the_next(count: int, draft: int, rows: int) -> None:
    """No generating sequence waits for longer than it takes to run all others once."""
    scheduler = Scheduler(Memory(1 << 20), max_sequences=count, max_step_rows=rows)
    for arrival in range(count):
        scheduler.add(sequence(arrival, 1, 60, decoder=SelfSpeculation(draft)))
    last = dict.fromkeys(range(count), 0)
    # A part is kept for prompts while there are any.
    longest = -(-count * (draft + 1) // (rows - rows // PROMPT_SHARE)) + 1
    for step in range(1, 200):
        for part in run_step(scheduler):
            last[part.sequence.arrival] = step
        generating = [s.arrival for s in scheduler.running if s.num_output]
        assert all(step - last[arrival] <= longest for arrival in generating)


@pytest.mark.parametrize("is_preempted", [False, True])
@pytest.mark.parametrize("decoder", [BlockDiffusion(8, UnmaskRule(rule="confidence"), finish_patch=False),
                                     VerifiedDiffusion(8, UnmaskRule(rule="one_step"))])  # fmt: skip
def test_prompts_go_on_while_rounds_fill_every_step(decoder: Decoder, is_preempted: bool) -> None:
    scheduler = Scheduler(Memory(1 << 20), max_sequences=64, max_step_rows=256)
    crowd = [sequence(arrival, 1, 2000, decoder=copy(decoder)) for arrival in range(60)]
    for s in crowd:
        scheduler.add(s)
    for _ in range(20):
        run_step(scheduler)
    late = sequence(99, 300, 5)
    if is_preempted:
        scheduler.preempt(crowd[-1])
        late = crowd[-1]
    else:
        scheduler.add(late)
    outputs = [s.num_output for s in crowd]
    for _ in range(-(-late.remaining // 64) + 8):
        run_step(scheduler)
    assert late.num_output and late.num_computed > 0 and late in scheduler.running or late.num_output == 5
    assert all(s.num_output > before for s, before in zip(crowd[:-1], outputs, strict=False))


def test_rounds_have_all_rows_while_no_prompt_can_go_on() -> None:
    class NotFor9(Memory):
        def reserve(self, rows: Rows) -> bool:
            return rows.sequence.arrival != 9 and super().reserve(rows)

    scheduler = Scheduler(NotFor9(1 << 20), max_sequences=16, max_step_rows=8)
    for arrival in range(8):
        scheduler.add(sequence(arrival, 1, 500))
    for _ in range(30):
        run_step(scheduler)
    assert [part.num_rows for part in run_step(scheduler)] == [1] * 8
    scheduler.add(sequence(9, 20, 1))
    # The first step keeps rows for it, and finds that it lacks pages.
    sizes = [len(run_step(scheduler)) for _ in range(4)]
    assert sizes == [6, 8, 8, 8]


def test_a_step_looks_at_few_of_thousands_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, looks = Scheduler(Memory(1 << 30), max_sequences=64, max_step_rows=256, max_prompt_rows=64), count()
    for arrival in range(3000):
        scheduler.add(sequence(arrival, 20 + arrival % 100, 2))
    asked = waiting.place

    def noted(sequence: Sequence, *, short_first: bool) -> tuple[int, ...]:
        next(looks)
        return asked(sequence, short_first=short_first)

    for module in (waiting, scheduling):
        monkeypatch.setattr(module, "place", noted)
    for _ in range(50):
        run_step(scheduler)
    assert len(scheduler.waiting) > 2500 and next(looks) < 50 * 50


@given(
    jobs=st.lists(st.tuples(st.integers(-2, 2), st.integers(1, 9), st.integers(-3, 3)), max_size=30),
    draw=st.randoms(use_true_random=False),
)
def test_those_that_wait_are_found_in_both_orders(jobs: list[tuple[int, int, int]], draw: Random) -> None:
    held, line = list[Sequence](), waiting.Waiting()
    for arrival, (priority, prompt, due) in enumerate(jobs):
        held.append(sequence(arrival, prompt, 1, priority))
        held[-1].due = due
        line.add(held[-1])
        if draw.random() < 0.3:
            line.remove(gone := held.pop(draw.randrange(len(held))))
            with pytest.raises(KeyError):
                line.remove(gone)
    assert list(line) == sorted(held, key=lambda s: (s.due, s.arrival)) and len(line) == len(held)
    assert line.first == (list(line) or [None])[0]
    for short_first in (False, True):
        last, found = None, list[Sequence]()
        while after := line.after(last, short_first=short_first):
            last = waiting.place(after, short_first=short_first)
            found.append(after)
        key = (lambda s: (s.request.priority, s.remaining, s.due, s.arrival)) if short_first else None
        assert found == (sorted(held, key=key) if key else list(line))
