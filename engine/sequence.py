"""One sequence in the engine: its ids, its rows, its patches, its pages and its decoder."""

import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

from .config import EOS_ID
from .counts import Counts
from .decoders import Ask, Committed, Decoder, Result, Round
from .decoders.blt import Autoregressive
from .grammars import Constraint
from .memory.pages import BlockTable
from .output import Output
from .patching import Patching
from .types import Request

if TYPE_CHECKING:
    from array import array

    from .memory.prefix import Node


class Sequence:
    """The state of one request.

    `ids` is prompt plus output, all of it committed. `num_computed` rows of it have passed all stages and sit in the
    caches; a preempted sequence starts again from 0, with its patch starts kept, since a decided boundary is frozen.

    Each part has one writer: this file for ids, rows and patches; `engine.scheduler` for its place in the order,
    `engine.memory` for its pages, `engine.output` for what its client knows, `engine.costs.ledger` for its counts.
    """

    def __init__(
        self,
        request: Request,
        arrival: int,
        tables: dict[str, BlockTable],
        decoder: Decoder | None = None,
        mask_id: int | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        self.request, self.constraint = request, constraint
        self.arrival = arrival
        self.deadline = request.deadline
        self._submitted = time.monotonic() if request.submitted is None else request.submitted
        self.ids = [*request.prompt_ids, *request.output_ids]
        self.num_prompt = len(request.prompt_ids)
        self.id_counts = Counter(request.output_ids)
        """How often each id was generated; those of the prompt are there too, if a penalty asks for them."""
        if request.sampling.repetition_penalty != 1:
            self.id_counts.update(dict.fromkeys(request.prompt_ids, 0))
        self.num_computed = 0
        self.patching = Patching()
        self.documents = [0]
        """First byte of every document: after each EOS."""
        self.patch_documents = [0]
        """First patch of every document: after each patch that holds an EOS."""
        self.mask_id = -1 if mask_id is None else mask_id
        self.num_cached = 0
        """Ids of the prompt that were found in the prefix cache."""
        self._begun: float | None = None
        """When its first step began."""
        self._first: float | None = None
        """When its first id was committed."""
        self._decoder: Decoder = decoder or Autoregressive()
        self._round: Round | None = None
        self._ask: Ask | None = None
        self.last_round = 0
        """The last step of the scheduler in which it generated."""
        self.due = 0
        """The step that orders it: that of its arrival, and `STEPS_PER_PRIORITY` more for each unit of priority. Set by
        the scheduler."""
        self.preemptions = 0
        self.tables = tables
        self.slot = 0
        """Where its text lies on the device; 0 for nowhere."""
        self.prefix: Node | None = None
        """Its longest cached prefix, if it uses the prefix cache."""
        self.output = Output(request, constraint)
        self.counts = Counts()
        """Of all rounds, the current one included."""
        self._note_documents(self.ids)

    @property
    def order(self) -> tuple[int, int]:
        """Its place in the order; see `Scheduler`."""
        return self.due, self.arrival

    @property
    def num_output(self) -> int:
        return len(self.ids) - self.num_prompt

    @property
    def tokens_left(self) -> int:
        return self.request.max_tokens - self.num_output

    @property
    def remaining(self) -> int:
        """Rows to compute before the next id can be chosen."""
        return len(self.ids) - self.num_computed

    @property
    def scores_prompt(self) -> bool:
        """Whether rows of the prompt must still run for their scores."""
        return self.request.prompt_logprobs and self.output.num_scored < self.num_prompt

    @property
    def queue_seconds(self) -> float:
        """From its submission to its first step."""
        return (self._begun or time.monotonic()) - self._submitted

    @property
    def prefill_seconds(self) -> float:
        """From its first step to its first id, or until now; 0 before the first step."""
        return 0.0 if self._begun is None else (self._first or time.monotonic()) - self._begun

    @property
    def decode_seconds(self) -> float:
        """From its first id until now; 0 before the first id."""
        return 0.0 if self._first is None else time.monotonic() - self._first

    # Rounds.

    def choose(self) -> None:
        """Lets the decoder decide how the next round goes."""
        self._decoder.choose(self)

    def next_ask(self, room: int) -> Ask:
        """The ask of the current round; begins a round if there is none (`room`: see `Decoder.round`)."""
        if self._ask is None:
            self._round = self._decoder.round(self, room)
            self._ask = next(self._round)
        return self._ask

    def resume(self, result: Result) -> Committed | None:
        """Resumes the round with the result of its ask, and with that of the verification that follows if the step ran
        it too. Returns the outcome if the round has ended, else None."""
        assert self._round is not None
        try:
            self._ask = self._round.send(result)
            if result.verified:
                self._ask = self._round.send(result.verified)
        except StopIteration as end:
            self._drop_round()
            outcome: Committed = end.value
            return outcome
        return None

    def _drop_round(self) -> None:
        """Forgets the current round. None of its bytes have been committed."""
        self._round = self._ask = None

    # Rows.

    def note_step(self, now: float) -> int:
        """Notes the time of its first step. Returns the ids of its prompt that were cached, in later steps 0."""
        if self._begun is not None:
            return 0
        self._begun, self.num_cached = now, min(self.num_computed, self.num_prompt)
        return self.num_cached

    def advance(self, end: int) -> None:
        """Rows up to `end` have run."""
        self.num_computed = end

    def keep(self, end: int) -> None:
        """Rows up to `end` have run; any after it were fed ids that were not committed, and count as not run."""
        self.num_computed = end
        self.patching.cut(end)
        closed = len(self.patching.starts) - 1
        while self.patch_documents[-1] > closed:
            self.patch_documents.pop()

    def begin_after(self, end: int, num_closed: int, starts: Iterable[int], entropies: "array[float]") -> None:
        """Rows before `end` are in the caches already, and close `num_closed` patches. starts, entropies: see
        `Patching.resume`."""
        self.num_computed = end
        self.patching.resume(starts, entropies)
        self.note_patch_documents(num_closed)

    def restart(self) -> None:
        """Its pages were given back: all rows must run again, and the current round is dropped."""
        self.num_computed = 0
        self._drop_round()

    # Ids.

    def append(self, ids: Seq[int]) -> None:
        """Commits generated ids."""
        if self._first is None:
            self._first = time.monotonic()
        self.id_counts.update(ids)
        self.ids += ids
        self._note_documents(ids)

    def _note_documents(self, last: Seq[int]) -> None:
        """last: ids, the newest."""
        if EOS_ID in last:
            start = len(self.ids) - len(last) + 1
            self.documents += [after for after, token in enumerate(last, start) if token == EOS_ID]

    # Patches.

    @property
    def mean_patch(self) -> float:
        """Bytes per patch so far."""
        return max(self.patching.decided, 1) / len(self.patching.starts)

    @property
    def at_patch_start(self) -> bool:
        """Whether the next row to compute starts a patch."""
        return self.patching.starts[-1] == self.num_computed

    def decide(self, entropies: Seq[float], opens: Seq[bool]) -> None:
        """Takes the patcher's results for the next bytes; see `Patching.take`."""
        self.patching.take(entropies, opens)

    def note_patch_documents(self, end: int) -> None:
        """A patch that holds an EOS, of those before `end`, ends a document for the global stage."""
        # Those before were noted: a text may have thousands, and every step asks.
        first = self.patching.starts[self.patch_documents[-1]]
        for document in self.documents[bisect_right(self.documents, first) :]:
            after = self.patch_of(document - 1) + 1
            if after > end:
                break
            if after > self.patch_documents[-1]:
                self.patch_documents.append(after)

    def patch_of(self, byte: int) -> int:
        """Index of the patch that holds `byte`."""
        return bisect_right(self.patching.starts, byte) - 1

    def most_patches(self, end: int) -> int:
        """Most patches that are closed once rows up to `end` have run: an undecided byte may close one."""
        decided = self.patching.decided
        return self.patch_of(end) if end <= decided else self.patch_of(decided) + end - decided
