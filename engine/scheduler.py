"""Which rows run next. Integers only: no tensor, no text."""

import logging
from bisect import insort
from collections.abc import Container
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


STEPS_PER_PRIORITY = 256
"""Whoever has waited so many steps longer goes before one whose priority is one better."""
MOST_PRIORITY = 64
"""Priorities beyond this, to either side, count as this: so waiting makes up for any."""


class Scheduler:
    """Queues, row budgets, admission, order and preemption.

    A step runs the calls of sequences that generate, first of those that the last step had no rows for; then chunks of
    prompts, or of texts that must be computed again: of running sequences, or of waiting ones that it admits. It ends
    when `max_step_rows` are spent, or `max_prompt_rows` on prompts. A call is not cut once the ids before it are
    computed: the last may go beyond either.

    The order is fixed when a sequence comes: by the step of its arrival, later or earlier by `STEPS_PER_PRIORITY` for
    each unit of priority. So only those that come within a known number of steps can overtake, and nobody starves.
    Every other time prompts take their turns in this order, so that the first always gets on; in between, those of a
    better priority and then the shortest go first, so that short ones do not wait for long ones. While memory is short
    all go in order, so that pages are left to the first in line.

    When pages run out the last in the order is preempted: it gives all its pages back, waits at its old place, and is
    recomputed later. The first in the order is never preempted by another, so there is always progress.
    """

    def __init__(
        self, pages: Pages, *, max_sequences: int, max_step_rows: int, max_prompt_rows: int | None = None
    ) -> None:
        self._pages = pages
        self._max_sequences = max_sequences
        self._max_step_rows = max_step_rows
        self.max_prompt_rows = max_prompt_rows or max_step_rows
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._steps = 0
        self._prefers_short = False
        self._passed_over: set[int] = set()
        """Sequences that generate and did not fit into the last step."""

    def add(self, sequence: Sequence) -> None:
        priority = min(max(sequence.request.priority, -MOST_PRIORITY), MOST_PRIORITY)
        sequence.due = self._steps + STEPS_PER_PRIORITY * priority
        insort(self.waiting, sequence, key=_order)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and gives its pages back."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._pages.release(sequence)

    def schedule(self) -> list[Part]:
        """The parts of the next step; their pages are reserved."""
        self._steps += 1
        step = _Step(self._max_step_rows, self.max_prompt_rows)
        preempted = self.preemptions
        rounds = [s for s in self.running if not _reads(s)]
        for sequence in sorted(rounds, key=lambda s: s.arrival not in self._passed_over):
            if step.rows_left > 0 and sequence in self.running:
                self._run(sequence, step, step.rows_left, is_prompt=False)
        self._passed_over = {s.arrival for s in rounds if s.arrival not in step.ran}
        self._add_prompts(step, may_admit=self.preemptions == preempted)
        return step.parts

    def _add_prompts(self, step: "_Step", may_admit: bool) -> None:
        """may_admit: whether memory was not short so far."""
        line = list(self.waiting) if len(self.running) < self._max_sequences else []
        waiting = {s.arrival for s in line}
        prompts = [s for s in self.running if _reads(s)] + line
        for sequence in sorted(prompts, key=_shortest_first if self._prefers_short else _order):
            if step.prompt_rows_left <= 0:
                break
            if sequence.arrival in waiting:
                may_admit = may_admit and self._admit(sequence, step)
            elif sequence in self.running and not self._run(sequence, step, step.prompt_rows_left, is_prompt=True):
                may_admit = False
        self._prefers_short = step.has_prompts and may_admit and not self._prefers_short

    def _admit(self, sequence: Sequence, step: "_Step") -> bool:
        """Lets a waiting sequence run if there is a slot, others than the first in line if there is one for that too;
        False if it lacks pages."""
        slots = self._max_sequences - len(self.running)
        if slots < (1 if sequence is self.waiting[0] else 2):
            return True
        self._pages.attach(sequence)
        part = self._part(sequence, step.prompt_rows_left)
        if not self._pages.can_reserve(part):
            self._send_back(sequence)
            return False
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_order)
        self._pages.reserve(part)
        step.add(part, is_prompt=True)
        return True

    def _run(self, sequence: Sequence, step: "_Step", rows: int, *, is_prompt: bool) -> bool:
        """Adds a running sequence's part, for which others may be preempted; False if somebody was."""
        part = self._part(sequence, rows)
        preempted = self.preemptions
        if self._make_room(part, step):
            step.add(part, is_prompt=is_prompt)
        return self.preemptions == preempted

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
        insort(self.waiting, sequence, key=_order)

    def _send_back(self, sequence: Sequence) -> None:
        self._pages.release(sequence)
        sequence.num_computed = 0
        sequence.drop_round()

    def _make_room(self, part: Part, step: "_Step") -> bool:
        """Reserves pages, preempting from the back; False if the sequence itself had to go."""
        while not self._pages.can_reserve(part):
            victim = self.running[-1]
            step.drop(victim)
            self.preempt(victim)
            if victim is part.sequence:
                return False
        self._pages.reserve(part)
        return True


class _Step:
    """The parts so far, and the rows that are left."""

    def __init__(self, rows: int, prompt_rows: int) -> None:
        self.rows_left = rows
        self._prompt_rows_left = prompt_rows
        self._calls: dict[int, Part] = {}
        self._prompts: dict[int, Part] = {}

    @property
    def parts(self) -> list[Part]:
        return [*self._calls.values(), *self._prompts.values()]

    @property
    def ran(self) -> Container[int]:
        """Arrivals of the sequences whose calls it has."""
        return self._calls

    @property
    def has_prompts(self) -> bool:
        return bool(self._prompts)

    @property
    def prompt_rows_left(self) -> int:
        return min(self._prompt_rows_left, self.rows_left)

    def add(self, part: Part, *, is_prompt: bool) -> None:
        (self._prompts if is_prompt else self._calls)[part.sequence.arrival] = part
        self.rows_left -= part.num_rows
        self._prompt_rows_left -= part.num_rows if is_prompt else 0

    def drop(self, sequence: Sequence) -> None:
        """Takes back what the sequence was to run; must come before it loses its computed rows."""
        if part := self._calls.pop(sequence.arrival, None):
            self.rows_left += part.num_rows
        elif part := self._prompts.pop(sequence.arrival, None):
            self.rows_left += part.num_rows
            self._prompt_rows_left += part.num_rows


def _reads(sequence: Sequence) -> bool:
    """Whether it has a prompt before it, or a text to compute again, instead of a round."""
    return sequence.remaining > (MAX_DRAFT if sequence.num_output else 1)


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order


def _shortest_first(sequence: Sequence) -> tuple[int, int, tuple[int, int]]:
    return sequence.request.priority, sequence.remaining, sequence.order
