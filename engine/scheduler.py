"""Which rows run next. Integers only: no tensor, no text."""

import logging
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from .decoders import Call
from .sequence import Sequence
from .types import MAX_DRAFT

log = logging.getLogger("fastblt.engine")


@dataclass(frozen=True, slots=True)
class Part:
    """What one sequence does in a step: runs its clean rows up to `end`, and what else `call` asks for; without a call,
    only rows of committed ids on the way there."""

    sequence: Sequence
    end: int
    call: Call | None

    @property
    def num_rows(self) -> int:
        return self.end - self.sequence.num_computed + (self.call.num_cells if self.call else 0)

    @property
    def reach(self) -> int:
        """Position behind the last row."""
        if self.call is None or not self.call.num_cells:
            return self.end
        return self.call.start + self.call.num_cells + self.call.ahead


class Pages(Protocol):
    """What the scheduler must know of memory."""

    def can_reserve(self, part: Part) -> bool: ...

    def reserve(self, part: Part) -> None: ...

    def release(self, sequence: Sequence) -> None: ...

    def attach(self, sequence: Sequence) -> None:
        """Before a sequence is admitted: lets it begin behind what is known of its ids."""
        ...

    def room(self, sequence: Sequence) -> int:
        """Rows that the sequence may still run before it could outgrow the caches, were they its alone."""
        ...


class Scheduler:
    """Queues, row budget, admission and preemption.

    A step runs the calls of sequences that have few rows to go, as all do that generate, then prompt chunks of running
    sequences, then of waiting ones that it admits, until `max_step_rows` are spent. Order within each: priority, then
    arrival. A call is not cut once the ids before it are computed, so the last one in a step may go beyond the budget.
    When pages run out the last in that order is preempted: it gives all its pages back, waits at its old place, and is
    recomputed later. The first in the order is never preempted by another, so there is always progress.
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

    def schedule(self) -> list[Part]:
        """The parts of the next step; their pages are reserved."""
        budget = self._max_step_rows
        step: dict[int, Part] = {}
        for sequence in sorted(self.running, key=lambda s: (s.remaining > MAX_DRAFT, s.order)):
            if budget > 0 and sequence in self.running:
                part = self._part(sequence, budget)
                preempted = self.preemptions
                if self._make_room(part, step):
                    step[sequence.arrival] = part
                    budget -= part.num_rows
                if self.preemptions > preempted:
                    budget = self._max_step_rows - sum(part.num_rows for part in step.values())
        while budget > 0 and self.waiting and len(self.running) < self._max_sequences:
            sequence = self.waiting[0]
            self._pages.attach(sequence)
            part = self._part(sequence, budget)
            if not self._pages.can_reserve(part):
                self._send_back(sequence)
                break
            self.waiting.pop(0)
            insort(self.running, sequence, key=_order)
            self._pages.reserve(part)
            step[sequence.arrival] = part
            budget -= part.num_rows
        return list(step.values())

    def _part(self, sequence: Sequence, budget: int) -> Part:
        room = self._pages.room(sequence)
        call = sequence.next_call(room)
        end = len(sequence.ids) + len(call.drafts) if call.runs_clean else sequence.num_computed
        whole = Part(sequence, end, call)
        fits = whole.num_rows <= budget and end - sequence.num_computed <= room
        if fits or sequence.remaining <= 1:
            return whole
        return Part(sequence, sequence.num_computed + min(sequence.remaining - 1, budget, room), None)

    def preempt(self, sequence: Sequence) -> None:
        """Sends a running sequence back to wait, without its pages."""
        rows, fields = sequence.num_computed, sequence.request.log_fields
        log.debug("preempted for lack of pages; %d rows must be computed again", rows, extra=fields)
        self.running.remove(sequence)
        self._send_back(sequence)
        sequence.preemptions += 1
        self.preemptions += 1
        self.add(sequence)

    def _send_back(self, sequence: Sequence) -> None:
        self._pages.release(sequence)
        sequence.num_computed = 0
        sequence.drop_round()

    def _make_room(self, part: Part, step: dict[int, Part]) -> bool:
        """Reserves pages, preempting from the back; False if the sequence itself had to go."""
        while not self._pages.can_reserve(part):
            victim = self.running[-1]
            step.pop(victim.arrival, None)
            self.preempt(victim)
            if victim is part.sequence:
                return False
        self._pages.reserve(part)
        return True


_order: Callable[[Sequence], tuple[int, int]] = lambda s: s.order  # noqa: E731
