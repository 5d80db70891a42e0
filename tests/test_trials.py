"""Who is resumed after a crash, and who is blamed: simulated engines that die of poison, or are killed."""

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.process.streams import Stream
from engine.process.trials import LONE_CRASHES, Trials
from engine.types import Delta, Request


def stream(name: str, length: int = 3) -> Stream:
    return Stream(Request(id=name, prompt_ids=[1] * length, max_tokens=9))


def show(one: Stream) -> None:
    one.put(Delta(id=one.request.id, ids=[5], text=b"\x01"))


class Run:
    """Engines one after another. What is sent to one is read in that order, one at a time."""

    def __init__(self, streams: list[Stream], poison: set[Stream]) -> None:
        self.trials, self.alive, self.poison = Trials(), streams, poison
        self.failed: list[Stream] = []
        self.crashes = 0
        self.line: list[Stream] = []
        self.give()

    def give(self) -> None:
        for one in self.trials.due(self.alive):
            assert not one.sent
            one.send()
            self.line.append(one)

    def crash(self) -> None:
        self.crashes += 1
        self.line.clear()
        for one in self.trials.crashed(self.alive):
            self.alive.remove(one)
            self.failed.append(one)
        self.give()

    def step(self) -> bool:
        """The next that has told nothing tells something, or kills the engine. Whether there was one."""
        waiting = [one for one in self.line if one.silent and one in self.alive]
        if not waiting:
            return False
        if waiting[0] in self.poison:
            self.crash()
            return True
        show(waiting[0])
        if not self.trials.is_over:
            self.give()
        return True


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.data())
def test_only_poison_fails_and_all_others_come_back(lengths: list[int], data: st.DataObject) -> None:
    streams = [stream(str(number), length) for number, length in enumerate(lengths)]
    poison = set(data.draw(st.lists(st.sampled_from(streams), max_size=3)))
    run = Run(list(streams), poison)
    for _ in range(60 * len(streams) + 60):
        if not run.step():
            break
    assert set(run.failed) == poison
    assert all(one.sent and not one.silent for one in run.alive) and run.trials.is_over


@settings(max_examples=40)
@given(st.integers(2, 12), st.sets(st.integers(0, 11), max_size=2), st.lists(st.booleans(), min_size=1, max_size=9))
def test_suspects_do_not_starve_while_new_requests_come(count: int, bad: set[int], comes: list[bool]) -> None:
    """Up to half as many as the engine can begin. With more each crash costs more time, but still comes to an end."""
    streams = [stream(str(number)) for number in range(count)]
    poison = {one for number, one in enumerate(streams) if number in bad}
    run = Run(list(streams), poison)
    run.crash()
    run.crash()
    for number in range(40 * count + 40):
        if number % 2 and comes[number // 2 % len(comes)]:
            run.alive.append(stream(f"new {number}"))
            run.give()
        run.step()
    assert set(run.failed) == poison
    assert all(one.sent and not one.silent for one in streams if one not in poison)


@settings(max_examples=300)
@given(st.lists(st.sampled_from(["step", "kill", "come", "leave"]), max_size=60), st.integers(1, 9), st.data())
def test_who_fails_was_alone_in_three_crashes_and_nobody_is_forgotten(
    happens: list[str], count: int, data: st.DataObject
) -> None:
    run, came = Run([stream(str(number)) for number in range(count)], set()), count
    alone: dict[Stream, int] = {}
    for what in happens:
        if what == "step":
            run.step()
        elif what == "kill":
            silent = [one for one in run.alive if one.sent and one.silent]
            for one in run.alive:
                alone[one] = alone.get(one, 0) + (silent == [one]) if one in silent or not one.sent else 0
            before = len(run.failed)
            run.crash()
            for one in run.failed[before:]:
                assert alone[one] >= LONE_CRASHES
        elif what == "come":
            came += 1
            run.alive.append(stream(str(came)))
            run.give()
        elif run.alive:
            run.alive.remove(data.draw(st.sampled_from(run.alive)))
            run.give()
    while run.step():
        pass
    assert all(one.sent and not one.silent for one in run.alive) and run.trials.is_over


def test_a_first_crash_suspects_nobody_and_the_shortest_come_back_first() -> None:
    streams = [stream("long", 900), stream("b", 5), stream("a", 2)]
    run = Run(streams, set())
    while run.step():
        pass
    for one in run.trials.crashed(streams):
        raise AssertionError(one)
    assert [one.request.id for one in run.trials.due(streams)] == ["a", "b", "long"]


def test_suspects_wait_for_the_others_and_come_back_in_halves() -> None:
    streams = [stream(str(number)) for number in range(6)]
    run = Run(streams, set())
    run.crash()
    for one in streams[:2]:
        show(one)
    run.crash()
    assert [one.sent for one in streams] == [True, True, False, False, False, False]
    run.step()
    assert not any(one.sent for one in streams[2:])
    run.step()
    assert [one.sent for one in streams] == [True, True, True, True, False, False]
    new = stream("new")
    streams.append(new)
    run.give()
    assert new.sent
    # The half that kills another engine is halved; one alone is tried in an engine that has nothing else.
    run.step()
    run.crash()
    assert [one for one in streams if one.sent] == [streams[3]]
    run.step()
    assert new.sent
