"""Which rows run next. Integers only: no tensor, no text."""

import logging
from bisect import insort
from collections.abc import Container
from typing import Protocol

from .rows import Rows
from .sequence import Sequence
from .types import MAX_DRAFT

log = logging.getLogger("fastblt.engine")


class Memory(Protocol):
    """What the scheduler asks of memory; see `engine.memory.memory`."""

    def fits(self, rows: Rows) -> bool: ...

    def reserve(self, rows: Rows) -> None: ...

    def release(self, sequence: Sequence) -> None: ...

    def attach(self, sequence: Sequence) -> None: ...

    def room(self, sequence: Sequence) -> int: ...


STEPS_PER_PRIORITY = 256
"""A sequence that has waited so many steps longer goes before one whose priority is one better."""
MOST_PRIORITY = 64
"""Priorities beyond this, to either side, count as this: so waiting makes up for any."""


class Scheduler:
    """Queues, row budgets, admission, order and preemption.

    A step runs the asks of sequences that generate, first of those that the last step had no rows for; then chunks of
    prompts, or of texts that must be computed again: of running sequences, or of waiting ones that it admits. It ends
    when `max_step_rows` are spent, or `max_prompt_rows` on prompts. An ask is not cut once the ids before it are
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
        self, memory: Memory, *, max_sequences: int, max_step_rows: int, max_prompt_rows: int | None = None
    ) -> None:
        self._memory = memory
        self._max_sequences = max_sequences
        self.max_step_rows = max_step_rows
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
        self._memory.release(sequence)

    def schedule(self) -> list[Rows]:
        """The rows of the next step; their pages are reserved."""
        self._steps += 1
        step = _Step(self.max_step_rows, self.max_prompt_rows)
        preempted = self.preemptions
        rounds = [s for s in self.running if not _reads(s)]
        for sequence in sorted(rounds, key=lambda s: s.arrival not in self._passed_over):
            if step.rows_left > 0 and sequence in self.running:
                self._run(sequence, step, step.rows_left, is_prompt=False)
        self._passed_over = {s.arrival for s in rounds if s.arrival not in step.ran}
        self._add_prompts(step, may_admit=self.preemptions == preempted)
        return step.batch

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
        self._memory.attach(sequence)
        rows = self._rows(sequence, step.prompt_rows_left)
        if not self._memory.fits(rows):
            self._send_back(sequence)
            return False
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_order)
        self._memory.reserve(rows)
        step.add(rows, is_prompt=True)
        return True

    def _run(self, sequence: Sequence, step: "_Step", budget: int, *, is_prompt: bool) -> bool:
        """Adds a running sequence's rows, for which others may be preempted; False if one was."""
        rows = self._rows(sequence, budget)
        preempted = self.preemptions
        if self._make_room(rows, step):
            step.add(rows, is_prompt=is_prompt)
        return self.preemptions == preempted

    def _rows(self, sequence: Sequence, budget: int) -> Rows:
        """What it asks for, or as much of the text before that as the budget and the caches allow."""
        room = self._memory.room(sequence)
        whole = Rows.of(sequence, sequence.next_ask(room))
        fits = whole.num_rows <= budget and whole.num_text <= room
        if fits or sequence.remaining <= 1:
            return whole
        return Rows.prefill(sequence, sequence.num_computed + min(sequence.remaining - 1, budget, room))

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
        self._memory.release(sequence)
        sequence.restart()

    def _make_room(self, rows: Rows, step: "_Step") -> bool:
        """Reserves pages, preempting from the back; False if the sequence itself had to go."""
        while not self._memory.fits(rows):
            victim = self.running[-1]
            step.drop(victim)
            self.preempt(victim)
            if victim is rows.sequence:
                return False
        self._memory.reserve(rows)
        return True


class _Step:
    """The rows so far, and how many are left."""

    def __init__(self, rows: int, prompt_rows: int) -> None:
        self.rows_left = rows
        self._prompt_rows_left = prompt_rows
        self._rounds: dict[int, Rows] = {}
        self._prompts: dict[int, Rows] = {}

    @property
    def batch(self) -> list[Rows]:
        return [*self._rounds.values(), *self._prompts.values()]

    @property
    def ran(self) -> Container[int]:
        """Arrivals of the sequences whose rounds it has."""
        return self._rounds

    @property
    def has_prompts(self) -> bool:
        return bool(self._prompts)

    @property
    def prompt_rows_left(self) -> int:
        return min(self._prompt_rows_left, self.rows_left)

    def add(self, rows: Rows, *, is_prompt: bool) -> None:
        (self._prompts if is_prompt else self._rounds)[rows.sequence.arrival] = rows
        self.rows_left -= rows.num_rows
        self._prompt_rows_left -= rows.num_rows if is_prompt else 0

    def drop(self, sequence: Sequence) -> None:
        """Takes back what the sequence was to run."""
        if rows := self._rounds.pop(sequence.arrival, None):
            self.rows_left += rows.num_rows
        elif rows := self._prompts.pop(sequence.arrival, None):
            self.rows_left += rows.num_rows
            self._prompt_rows_left += rows.num_rows


def _reads(sequence: Sequence) -> bool:
    """Whether it has a prompt, or a text to compute again, before its next round."""
    return sequence.remaining > (MAX_DRAFT if sequence.num_output else 1)


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order


def _shortest_first(sequence: Sequence) -> tuple[int, int, tuple[int, int]]:
    return sequence.request.priority, sequence.remaining, sequence.order
