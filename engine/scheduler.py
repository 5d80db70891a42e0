"""Which rows run next. Integers only: no tensor, no text."""

from bisect import insort
from collections.abc import Callable
from typing import Protocol

from .sequence import Sequence


class Pages(Protocol):
    """What the scheduler must know of memory."""

    def can_reserve(self, sequence: Sequence, end: int) -> bool: ...

    def reserve(self, sequence: Sequence, end: int) -> None: ...

    def release(self, sequence: Sequence) -> None: ...

    def room(self, sequence: Sequence) -> int:
        """Rows that the sequence may still run before it could outgrow the caches, were they its alone."""
        ...


class Scheduler:
    """Queues, row budget, admission and preemption.

    A step runs one row of every sequence that is generating, then prompt chunks of running sequences, then of waiting
    ones that it admits, until `max_step_rows` are spent. Order within each: priority, then arrival. When pages run out
    the last in that order is preempted: it gives all its pages back, waits at its old place, and is recomputed later.
    The first in the order is never preempted by another, so there is always progress.
    """

    def __init__(self, pages: Pages, *, max_sequences: int, max_step_rows: int) -> None:
        self._pages = pages
        self._max_sequences = max_sequences
        self._max_step_rows = max_step_rows
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_order)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and gives its pages back."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._pages.release(sequence)

    def schedule(self) -> list[tuple[Sequence, int]]:
        """The sequences of the next step with the row up to which each runs; their pages are reserved."""
        budget = self._max_step_rows
        step: dict[int, tuple[Sequence, int]] = {}
        for sequence in sorted(self.running, key=lambda s: (s.remaining > 1, s.order)):
            if budget and sequence in self.running:
                rows = min(sequence.remaining, budget, self._pages.room(sequence))
                if self._make_room(sequence, sequence.num_computed + rows, step):
                    step[sequence.arrival] = (sequence, sequence.num_computed + rows)
                    budget = self._max_step_rows - sum(end - s.num_computed for s, end in step.values())
        while budget and self.waiting and len(self.running) < self._max_sequences:
            sequence = self.waiting[0]
            end = min(sequence.remaining, budget, self._pages.room(sequence))
            if not self._pages.can_reserve(sequence, end):
                break
            self.waiting.pop(0)
            insort(self.running, sequence, key=_order)
            self._pages.reserve(sequence, end)
            step[sequence.arrival] = (sequence, end)
            budget -= end - sequence.num_computed
        return list(step.values())

    def preempt(self, sequence: Sequence) -> None:
        """Sends a running sequence back to wait, without its pages."""
        self.running.remove(sequence)
        self._pages.release(sequence)
        sequence.num_computed = 0
        sequence.preemptions += 1
        self.preemptions += 1
        self.add(sequence)

    def _make_room(self, sequence: Sequence, end: int, step: dict[int, tuple[Sequence, int]]) -> bool:
        """Reserves pages, preempting from the back; False if the sequence itself had to go."""
        while not self._pages.can_reserve(sequence, end):
            victim = self.running[-1]
            step.pop(victim.arrival, None)
            self.preempt(victim)
            if victim is sequence:
                return False
        self._pages.reserve(sequence, end)
        return True


_order: Callable[[Sequence], tuple[int, int]] = lambda s: s.order  # noqa: E731
