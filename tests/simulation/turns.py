"""Who must have had rows in a step: the order of `engine.scheduler`, computed again from arrivals and priorities.

Where memory is not short, in every step:

* while a prompt has a place, or can have one, a prompt has rows, and those with a place have a quarter of a step's;
* those that have are the first in the order, or, but not in two steps running, the first by priority and length;
* whoever takes the last place is the first in line.

So the first in the order is read in every second step, whatever else there is, and the wait for a first byte ends after
the work of those before it and of the few that may overtake it.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from engine.rows import Rows
from engine.scheduler import Memory, Scheduler
from engine.sequence import Sequence

STEPS_PER_PRIORITY, PROMPT_SHARE = 256, 4
"""As docs/operations.md promises, whatever the scheduler has."""


class Unfair(AssertionError):
    """A step gave rows to the wrong ones."""


class _Prompt(NamedTuple):
    """One that wants rows, as it is before a step."""

    sequence: Sequence
    due: tuple[int, int]
    """Its place in the order."""
    by_length: tuple[int, int, int, int]
    has_place: bool


class _Watched:
    """Memory that knows whether it was ever short."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.was_short = False

    def reserve(self, rows: Rows) -> bool:
        fits = self._memory.reserve(rows)
        self.was_short = self.was_short or not fits
        return fits

    def release(self, sequence: Sequence) -> None:
        self._memory.release(sequence)

    def attach(self, sequence: Sequence) -> None:
        self._memory.attach(sequence)

    def room(self, sequence: Sequence) -> int:
        return self._memory.room(sequence)


class Turns:
    """Checks every step of one scheduler."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._memory = scheduler._memory = _Watched(scheduler._memory)
        self._schedule: Callable[[], list[Rows]] = scheduler.schedule
        self._steps = 0
        self._arrived = dict[int, int]()
        """The step that each sequence came after."""
        self._in_order = True
        """Whether the last step can have gone by the order."""
        setattr(scheduler, "schedule", self.schedule)  # noqa: B010

    def schedule(self) -> list[Rows]:
        """Raises Unfair."""
        scheduler, memory = self._scheduler, self._memory
        prompts = self._prompts()
        # Until one has ended, pages are not tried again.
        memory.was_short = scheduler._lacks_pages
        batch = self._schedule()
        self._steps += 1
        served = {rows.sequence.arrival for rows in batch}
        if memory.was_short or not prompts:
            self._in_order = True
            return batch
        self._check_some(prompts, served)
        self._check_share(prompts, batch)
        self._check_last_place(prompts)
        self._check_order(prompts, served)
        return batch

    def _prompts(self) -> list[_Prompt]:
        scheduler = self._scheduler
        waiting = list(scheduler.waiting)
        for sequence in waiting:
            self._arrived.setdefault(sequence.arrival, self._steps)
        reads = [s for s in scheduler.running if s.remaining > (scheduler._longest_draft if s.num_output else 1)]
        return [*self._of(reads, has_place=True), *self._of(waiting, has_place=False)]

    def _of(self, sequences: Iterable[Sequence], *, has_place: bool) -> Iterable[_Prompt]:
        for s in sequences:
            priority = s.request.priority
            due = self._arrived[s.arrival] + STEPS_PER_PRIORITY * priority, s.arrival
            yield _Prompt(s, due, (priority, s.remaining, *due), has_place)

    @property
    def _places(self) -> int:
        return self._scheduler._max_sequences - len(self._scheduler.running)

    def _check_some(self, prompts: list[_Prompt], served: set[int]) -> None:
        """After a step. One that could have had a place and got none leaves it free."""
        can = [p for p in prompts if p.has_place or self._places > 0]
        if can and not any(p.sequence.arrival in served for p in prompts):
            first = min(can, key=lambda p: p.due).sequence.request.id
            raise Unfair(f"no prompt had rows in a step, though {first} could")

    def _check_share(self, prompts: list[_Prompt], batch: list[Rows]) -> None:
        """An ask of those that generate is not cut, so the last may take of the prompts' share. A prompt's last row
        waits for its ask to fit, and what lies beyond the caches for patches to be decided."""
        them = {p.sequence.arrival for p in prompts}
        had = sum(rows.num_rows for rows in batch if rows.sequence.arrival in them)
        ask = max((rows.num_rows for rows in batch if rows.sequence.arrival not in them), default=1)
        share = min(self._scheduler.max_step_rows // PROMPT_SHARE, self._scheduler.max_prompt_rows) - (ask - 1)
        placed = (p.sequence for p in prompts if p.has_place)
        if had < min(share, sum(min(s.remaining - 1, self._memory.room(s)) for s in placed)):
            raise Unfair(f"prompts had only {had} rows of a step")

    def _check_last_place(self, prompts: list[_Prompt]) -> None:
        running = {sequence.arrival for sequence in self._scheduler.running}
        line = [p for p in prompts if not p.has_place]
        if not line or self._places > 0 or not any(p.sequence.arrival in running for p in line):
            return
        first = min(line, key=lambda p: p.due).sequence
        if first.arrival not in running:
            raise Unfair(f"{first.request.id} was the first in line, and another took the last place")

    def _check_order(self, prompts: list[_Prompt], served: set[int]) -> None:
        late = self._overtaken(prompts, served, lambda p: p.due)
        short_first = self._overtaken(prompts, served, lambda p: p.by_length)
        if late and (short_first or not self._in_order):
            raise Unfair(f"{late.sequence.request.id} was overtaken{'' if short_first else ' in two steps running'}")
        self._in_order = late is None

    def _overtaken(
        self, prompts: list[_Prompt], served: set[int], key: Callable[[_Prompt], tuple[int, ...]]
    ) -> _Prompt | None:
        """One that had no rows though one behind it had them, and it was not for lack of a place. key: the order."""
        had = [p for p in prompts if p.sequence.arrival in served]
        left = [p for p in prompts if p.sequence.arrival not in served]
        last = self._in_last_place(had, left, key)
        for prompt in sorted(left, key=key):
            for other in had:
                is_ahead = key(prompt) < key(other)
                # Who waits may lack a place that others have.
                if is_ahead and (prompt.has_place or not (other.has_place or other is last)):
                    return prompt
        return None

    def _in_last_place(
        self, had: list[_Prompt], left: list[_Prompt], key: Callable[[_Prompt], tuple[int, ...]]
    ) -> _Prompt | None:
        """Who took the last place as the first of those in line then."""
        last = max((p for p in had if not p.has_place), key=key, default=None)
        line = (p.due for p in left if not p.has_place)
        return last if last and not self._places and last.due < min(line, default=last.due) else None
