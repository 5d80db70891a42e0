"""Whose turn it is: requests of several API keys, in any order of arrivals, turns, answers and departures."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.admission import LOOKAHEAD, Gate, Ticket
from server.errors import ApiError
from server.settings import ServerSettings
from server.tenants import GENERATED_WEIGHT

CAPACITY, MOST_CHOICES, MOST_BYTES, MOST_GENERATED = 60, 4, 50, 40
NAMES = [b"a", b"b", b"c", b"d"]
COST = MOST_BYTES + GENERATED_WEIGHT * MOST_GENERATED * MOST_CHOICES
"""Most that one request may count for."""


def gate(capacity: int = CAPACITY, *, is_shared: bool = True) -> Gate:
    return Gate(ServerSettings(max_queue=capacity, max_choices=MOST_CHOICES), lambda: is_shared)


class Turns(RuleBasedStateMachine):
    """A gate, and all that should follow from what was done with it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = gate()
        self.held: list[Ticket] = []
        """Requests without a complete answer."""
        self.number = 0

    @rule(
        name=st.sampled_from(NAMES),
        count=st.integers(1, MOST_CHOICES),
        size=st.integers(1, MOST_BYTES),
        priority=st.integers(-1, 1),
        times=st.sampled_from([1, 1, 30]),
        is_admitted=st.sampled_from([False, False, False, True]),
    )
    def enter(self, name: bytes, count: int, size: int, priority: int, times: int, is_admitted: bool) -> None:
        for _ in range(times):
            waiting, refused = self.waiting(), self.refused()
            try:
                self.held.append(self.gate.enter(count, name, size, priority, is_admitted=is_admitted))
            except ApiError as error:
                assert error.body["error"]["code"] == "queue_full" and not is_admitted
                assert self.refused() == refused, "nothing gives way for what is refused"
                # Others could not make room for it without waiting for less than this one would afterwards.
                share, freed = waiting[name] + count, 0
                for tenant, line in self.gate._lines.items():
                    left = tenant.waiting
                    for ticket in reversed([t for t in line if not t.is_admitted]):
                        if left > share:
                            left -= ticket.waiting
                            freed += ticket.waiting
                assert self.gate.queued + count - freed > CAPACITY

    @precondition(lambda self: any(t.waiting for t in self.running()))
    @rule(data=st.data(), num_bytes=st.integers(0, MOST_GENERATED))
    def first_event(self, data: st.DataObject, num_bytes: int) -> None:
        ticket = data.draw(st.sampled_from([t for t in self.running() if t.waiting]))
        ticket.begun()
        ticket.generated(num_bytes)

    @precondition(lambda self: self.running())
    @rule()
    def answer_the_oldest(self) -> None:
        ticket = self.running()[0]
        self.held.remove(ticket)
        while ticket.waiting:
            ticket.begun()
        ticket.close()
        ticket.close()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.held))
        self.held.remove(ticket)
        ticket.close()

    @precondition(lambda self: self.in_line())
    @rule(data=st.data())
    def time_out_in_line(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.in_line()))
        while ticket.waiting:
            ticket.begun()
        self.held.remove(ticket)
        ticket.close()

    @rule()
    def a_new_key_waits_for_one_turn_of_each_other(self) -> None:
        self.number += 1
        try:
            new = self.gate.enter(1, b"new %d" % self.number, 1)
        except ApiError:
            return
        before = {id(t) for t in self.held if t.has_turn}
        while not new.has_turn:
            # The engine answers what it has, however long that takes.
            ticket = next(t for t in self.running() if t.waiting)
            ticket.begun()
        names = Counter(t.tenant for t in self.held if t.has_turn and id(t) not in before)
        assert all(count == 1 for count in names.values())
        new.begun()
        new.close()

    def refused(self) -> int:
        return sum(t._refusal is not None for t in self.held)

    def running(self) -> list[Ticket]:
        return [t for t in self.held if t.has_turn]

    def in_line(self) -> list[Ticket]:
        return [t for t in self.held if not t.has_turn]

    def waiting(self) -> Counter[bytes]:
        counts = Counter[bytes]()
        for name, tenant in self.gate._tenants.items():
            counts[name] = tenant.waiting
        return counts

    @invariant()
    def all_is_counted(self) -> None:
        assert self.gate.waiting == sum(t.waiting for t in self.held)
        admitted = [t for t in self.held if t.is_admitted]
        assert self.gate.queued == self.gate.waiting - sum(t.waiting for t in admitted) <= CAPACITY
        assert not any(t._refusal for t in admitted)
        for tenant in self.gate._tenants.values():
            own = [t for t in self.held if t.tenant is tenant]
            assert tenant.requests == len(own)
            assert tenant.waiting == sum(t.waiting for t in own)
            assert tenant.queued_bytes == sum(t.prompt_bytes for t in own if t.waiting)

    @invariant()
    def the_engine_is_busy_and_not_flooded(self) -> None:
        ahead = sum(t.waiting for t in self.running())
        assert ahead < LOOKAHEAD + MOST_CHOICES
        assert ahead >= LOOKAHEAD or not self.in_line()

    @invariant()
    def keys_that_wait_have_been_served_alike(self) -> None:
        served = [tenant.served for tenant in {t.tenant for t in self.in_line()} if tenant]
        # What is in the engine was not known when its turn came.
        assert not served or max(served) - min(served) <= COST * (LOOKAHEAD + len(self.running()))

    def teardown(self) -> None:
        for ticket in self.held:
            ticket.close()
        self.held = []
        self.all_is_counted()
        assert not self.gate._lines and self.gate._idle.is_set()


TestTurns = Turns.TestCase
TestTurns.settings = settings(max_examples=40, stateful_step_count=40)


async def test_priority_orders_the_requests_of_a_key_and_no_others() -> None:
    shared = gate()
    first = [shared.enter(1, b"a", 1) for _ in range(LOOKAHEAD)]
    asked = [(b"a", 5), (b"a", 0), (b"b", 9), (b"b", 9), (b"a", -3)]
    rest = [shared.enter(1, name, 1, priority) for name, priority in asked]
    order: list[int] = []
    for ticket in first[: len(rest)]:
        ticket.begun()
        order += [number for number, t in enumerate(rest) if t.has_turn and number not in order]
    assert order == [2, 4, 3, 1, 0]


async def test_two_keys_share_equally_whatever_one_has_sent_and_got_before() -> None:
    shared = gate(1_000)
    many = [shared.enter(1, b"many", 20) for _ in range(800)]
    few: list[Ticket] = []

    def answer(count: int) -> None:
        for _ in range(count):
            ticket = next(t for t in (*many, *few) if t.has_turn and t.waiting)
            ticket.begun()
            ticket.generated(30)
            ticket.close()

    answer(200)
    few += [shared.enter(1, b"few", 20) for _ in range(100)]
    for answered in range(10, 150, 10):
        answer(10)
        assert abs(sum(t.has_turn for t in few) - answered / 2) <= LOOKAHEAD


async def test_in_a_full_queue_the_longest_line_gives_way_to_a_shorter_one() -> None:
    shared = gate(40)
    many = [shared.enter(1, b"many", 9) for _ in range(40)]
    few = shared.enter(4, b"few", 9)
    assert [t.waiting for t in many] == [1] * 36 + [0] * 4
    with pytest.raises(ApiError, match="40 sequences wait of at most 40, and this request gave way to one of another"):
        await many[-1].turn()
    with pytest.raises(ApiError, match="the queue is full: 40 sequences wait of at most 40; try again later"):
        shared.enter(1, b"many", 9)
    for ticket in (*many, few):
        ticket.close()
    assert shared.waiting == 0


async def test_what_another_server_admitted_never_gives_way_and_is_the_first_of_its_key() -> None:
    shared = gate(40)
    many = [shared.enter(1, b"many", 9) for _ in range(39)]
    continued = [shared.enter(1, b"many", 9, is_admitted=True) for _ in range(2)]
    few = shared.enter(2, b"few", 9)
    assert not any(t.has_turn for t in continued) and [t.waiting for t in continued] == [1, 1]
    assert [t.waiting for t in many] == [1] * 38 + [0]
    ticket = next(t for t in many if t.has_turn)
    ticket.begun()
    # The keys take turns; the first of them is the one that has been served less.
    assert few.has_turn
    for _ in range(2):
        next(t for t in many if t.has_turn and t.waiting).begun()
    assert any(t.has_turn for t in continued) and not many[LOOKAHEAD].has_turn

    only = gate(MOST_CHOICES)
    first = [only.enter(1, b"a", 1) for _ in range(MOST_CHOICES)]
    waits = [only.enter(1, b"a", 1, is_admitted=True) for _ in range(LOOKAHEAD)]
    with pytest.raises(ApiError, match="queue is full"):
        only.enter(1, b"b", 1)
    assert all(t.waiting for t in (*first, *waits))


async def test_what_another_server_admitted_takes_no_room_from_what_comes_here() -> None:
    shared = gate(4)
    continued = [shared.enter(2, b"many", 9, is_admitted=True) for _ in range(50)]
    held = [shared.enter(1, b"few", 1) for _ in range(4)]
    with pytest.raises(ApiError, match="the queue is full: 4 sequences wait of at most 4"):
        shared.enter(1, b"few", 1)
    for ticket in (*continued, *held):
        ticket.close()
    assert shared.waiting == shared.queued == 0


async def test_a_generated_byte_counts_as_two_of_a_prompt() -> None:
    shared = gate(1_000)
    lines = {name: [shared.enter(1, name, 20) for _ in range(300)] for name in (b"long", b"short")}
    for _ in range(200):
        ticket = next(t for line in lines.values() for t in line if t.has_turn and t.waiting)
        ticket.begun()
        ticket.generated(30 if ticket in lines[b"long"] else 0)
        ticket.close()
    long, short = (sum(t.has_turn for t in line) for line in lines.values())
    # 20 + 2 * 30 bytes against 20.
    assert abs(4 * long - short) <= 4 * LOOKAHEAD


async def test_a_request_that_is_refused_all_the_same_costs_others_nothing() -> None:
    shared = gate(60)
    waiting = [shared.enter(1, name, 9) for name in [b"a"] * 59 + [b"b"]]
    for _ in range(3):
        with pytest.raises(ApiError, match="the queue is full: 60 sequences wait of at most 60; try again later"):
            shared.enter(40, b"b", 9)
    assert shared.waiting == 60 and not any(t._refusal for t in waiting)
    shared.enter(4, b"b", 9)
    assert shared.waiting == 60 and sum(t._refusal is not None for t in waiting) == 4


async def test_one_key_alone_waits_for_no_turn() -> None:
    alone = gate(is_shared=False)
    assert all(alone.enter(1, b"a", 1).has_turn for _ in range(CAPACITY))
    with pytest.raises(ApiError, match="queue is full"):
        alone.enter(1, b"b", 1)


async def test_keys_that_come_and_go_are_forgotten() -> None:
    shared = gate()
    for number in range(1_000):
        ticket = shared.enter(1, b"%d" % number, 10)
        ticket.begun()
        ticket.generated(100)
        ticket.close()
    assert len(shared._tenants) < 10
