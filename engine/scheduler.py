"""Which rows run next. Integers only: no tensor, no text."""

import logging
from bisect import insort
from collections.abc import Iterator
from heapq import merge
from typing import Protocol

from .rows import Rows
from .sequence import Sequence
from .types import MAX_DRAFT
from .waiting import Place, Waiting, place

log = logging.getLogger("fastblt.engine")


class Memory(Protocol):
    """What the scheduler needs of memory; see `engine.memory.memory`."""

    def reserve(self, rows: Rows) -> bool: ...

    def release(self, sequence: Sequence) -> None: ...

    def attach(self, sequence: Sequence) -> None: ...

    def room(self, sequence: Sequence) -> int: ...


STEPS_PER_PRIORITY = 256
"""A sequence that has waited this many steps longer goes before one whose priority is one better."""
MOST_PRIORITY = 64
"""Priorities are clipped to plus or minus this, so that waiting makes up for any difference."""


PROMPT_SHARE = 4
"""1 / PROMPT_SHARE of a step's rows is kept for prompts, while there are any."""
MOST_ATTACHED = 32_768
"""A step admits no further sequence once those that it has admitted found more ids than this in the prefix cache: these
need no rows, but time on the host, a few milliseconds for so many."""


class Scheduler:
    """Queues, row budgets, admission, order and preemption.

    A step first runs the asks of sequences that generate, beginning with those that have not run for longest, in all of
    its rows or, while prompts can progress, in three of four.
    Then it runs chunks of prompts, and of texts that must be computed again: those of running sequences, or of waiting
    ones that it admits. It is full at `max_step_rows` rows, or at `max_prompt_rows` of prompts. An ask is not cut once
    the ids before it are computed, so the last one may exceed either limit. It admits no more sequences once those
    that it has admitted had more than `MOST_ATTACHED` cached ids.

    The order is fixed when a sequence arrives: by the step of its arrival, later or earlier by `STEPS_PER_PRIORITY` for
    each unit of priority. So only sequences that arrive within a known number of steps can overtake, and none starves.
    In every second step prompts go in this order, so that the first always advances. In the others those of a better
    priority go first, and among equals the shortest, so that short prompts do not wait for long ones. While memory is
    short all go in order, so that the first gets the pages.

    When pages run out the last in the order is preempted: it gives all its pages back, waits at its old place, and is
    recomputed later. The first in the order is never preempted by another, so there is always progress.
    """

    def __init__(
        self,
        memory: Memory,
        *,
        max_sequences: int,
        max_step_rows: int,
        max_prompt_rows: int | None = None,
        longest_draft: int = MAX_DRAFT,
    ) -> None:
        """longest_draft: most rows that a round leaves for the next to compute."""
        self._memory = memory
        self._max_sequences = max_sequences
        self.max_step_rows = max_step_rows
        self.max_prompt_rows = max_prompt_rows or max_step_rows
        self._longest_draft = longest_draft
        self.waiting = Waiting()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._steps = 0
        self._prefers_short = False
        self._lacks_pages = False
        """Whether those that wait do so for pages, as far as is known."""

    def add(self, sequence: Sequence) -> None:
        priority = min(max(sequence.request.priority, -MOST_PRIORITY), MOST_PRIORITY)
        sequence.due = self._steps + STEPS_PER_PRIORITY * priority
        self.waiting.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and gives its pages back."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._memory.release(sequence)
        self._lacks_pages = False

    def schedule(self) -> list[Rows]:
        """The rows of the next step; their pages are reserved."""
        self._steps += 1
        step = _Step(self.max_step_rows, self.max_prompt_rows)
        preempted = self.preemptions
        rounds = [s for s in self.running if not self._prefills(s)]
        kept = self._kept_for_prompts(len(rounds))
        for sequence in sorted(rounds, key=lambda s: s.last_round):
            if step.rows_left > kept and sequence in self.running:
                self._run(sequence, step, step.rows_left - kept, is_prompt=False)
        for sequence in step.ran:
            sequence.last_round = self._steps
        self._add_prompts(step, may_admit=self.preemptions == preempted)
        return step.batch

    def _kept_for_prompts(self, num_rounds: int) -> int:
        """Rows of the step that are not for rounds: those of many drafts or blocks would fill every step."""
        may_admit = self.waiting and len(self.running) < self._max_sequences and not self._lacks_pages
        wanted = may_admit or num_rounds < len(self.running)
        return min(self.max_prompt_rows, self.max_step_rows // PROMPT_SHARE) if wanted else 0

    def _add_prompts(self, step: "_Step", may_admit: bool) -> None:
        """may_admit: False if memory was short in this step."""
        step.may_admit = may_admit
        prompts = sorted((self._place(s), s, False) for s in self.running if self._prefills(s))
        for _, sequence, waits in merge(prompts, self._in_line(step)):
            if step.prompt_rows_left <= 0:
                break
            if waits:
                step.may_admit = step.may_admit and self._admit(sequence, step)
            elif sequence in self.running and not self._run(sequence, step, step.prompt_rows_left, is_prompt=True):
                step.may_admit = False
        else:
            self._lacks_pages = not step.may_admit
        self._prefers_short = step.has_prompts and step.may_admit and not self._prefers_short

    def _prefills(self, sequence: Sequence) -> bool:
        """Whether it has a prompt, or a text to compute again, before its next round."""
        return sequence.remaining > (self._longest_draft if sequence.num_output else 1)

    def _place(self, sequence: Sequence) -> Place:
        """Among the prompts of this step."""
        return place(sequence, short_first=self._prefers_short)

    def _in_line(self, step: "_Step") -> Iterator[tuple[Place, Sequence, bool]]:
        """Those that wait, as long as the step can admit one. The last slot is for the first in line."""
        last: Place | None = None
        while step.may_admit and step.attached <= MOST_ATTACHED and (slots := self._max_sequences - len(self.running)):
            found = self.waiting.after(last, short_first=self._prefers_short) if slots > 1 else self.waiting.first
            if found is None or (last is not None and self._place(found) <= last):
                return
            last = self._place(found)
            yield last, found, True

    def _admit(self, sequence: Sequence, step: "_Step") -> bool:
        """Lets a waiting sequence run; False if it lacks pages."""
        self.waiting.remove(sequence)
        self._memory.attach(sequence)
        step.attached += sequence.num_computed
        rows = self._rows(sequence, step.prompt_rows_left)
        if not self._memory.reserve(rows):
            self._send_back(sequence)
            return False
        insort(self.running, sequence, key=_order)
        step.add(rows, is_prompt=True)
        return True

    def _run(self, sequence: Sequence, step: "_Step", budget: int, *, is_prompt: bool) -> bool:
        """Adds a running sequence's rows, preempting others if need be; False if one was preempted."""
        rows = self._rows(sequence, budget)
        preempted = self.preemptions
        if self._make_room(rows, step):
            step.add(rows, is_prompt=is_prompt)
        return self.preemptions == preempted

    def _rows(self, sequence: Sequence, budget: int) -> Rows:
        """The rows of its ask, or as much of the text before that as the budget and the caches allow."""
        room = self._memory.room(sequence)
        whole = Rows.of(sequence, sequence.next_ask(room))
        fits = whole.num_rows <= budget and whole.num_text <= room
        if fits or sequence.remaining <= 1:
            return whole
        return Rows.prefill(sequence, sequence.num_computed + min(sequence.remaining - 1, budget, room))

    def preempt(self, sequence: Sequence) -> None:
        """Returns a running sequence to the queue, without its pages."""
        rows, fields = sequence.num_computed, sequence.request.log_fields
        log.debug("preempted for lack of pages; %d rows must be computed again", rows, extra=fields)
        self.running.remove(sequence)
        self._send_back(sequence)
        sequence.preemptions += 1
        self.preemptions += 1

    def _send_back(self, sequence: Sequence) -> None:
        """It waits, without pages."""
        self._memory.release(sequence)
        sequence.restart()
        self.waiting.add(sequence)

    def _make_room(self, rows: Rows, step: "_Step") -> bool:
        """Reserves pages, preempting the last in the order first; False if the sequence itself was preempted."""
        while not self._memory.reserve(rows):
            victim = self.running[-1]
            step.drop(victim)
            self.preempt(victim)
            if victim is rows.sequence:
                return False
        return True


class _Step:
    """The rows of a step so far, and how many more fit."""

    def __init__(self, rows: int, prompt_rows: int) -> None:
        self.rows_left = rows
        self.may_admit = True
        """False once memory is short."""
        self.attached = 0
        """Ids of admitted sequences that were in the prefix cache."""
        self._prompt_rows_left = prompt_rows
        self._rounds: dict[int, Rows] = {}
        self._prompts: dict[int, Rows] = {}

    @property
    def batch(self) -> list[Rows]:
        return [*self._rounds.values(), *self._prompts.values()]

    @property
    def ran(self) -> Iterator[Sequence]:
        """The generating sequences whose rows it has."""
        return (rows.sequence for rows in self._rounds.values())

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
        """Removes the sequence's rows."""
        if rows := self._rounds.pop(sequence.arrival, None):
            self.rows_left += rows.num_rows
        elif rows := self._prompts.pop(sequence.arrival, None):
            self.rows_left += rows.num_rows
            self._prompt_rows_left += rows.num_rows


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order
