"""One sequence in the engine: its ids, its patches, its pages, its decoder and what it has cost."""

import time
from bisect import bisect_right
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING

from .config import EOS_ID
from .costs.accounting import PaperFormula
from .counts import Counts
from .decoders import Call, Committed, Decoder, Result, Round
from .decoders.blt import Autoregressive
from .memory.pages import BlockTable
from .patching import Patching
from .stopping import StopMatcher
from .types import Request, TokenLogprob, Usage

if TYPE_CHECKING:
    from .memory.prefix import Node


def start_of(documents: list[int], place: int) -> int:
    """Where the document begins that holds a byte or a patch. An EOS belongs to the document that it ends."""
    return documents[bisect_right(documents, place) - 1]


def pieces(documents: list[int], start: int, end: int) -> list[tuple[int, int, int]]:
    """start..end-1, cut where documents begin: first, behind the last, and where its document begins."""
    if documents[-1] <= start:
        return [(start, end, documents[-1])]
    cuts = [start, *(cut for cut in documents if start < cut < end), end]
    return [(begin, behind, start_of(documents, begin)) for begin, behind in pairwise(cuts)]


class Sequence:
    """The state of one request.

    `ids` is prompt plus output. `num_computed` rows of it have passed all stages and sit in the caches; a preempted
    sequence starts again from 0, with its patch starts kept, since a decided boundary is frozen. While a step verifies
    drafts, `ids` ends with them; between steps it never does.
    """

    def __init__(
        self,
        request: Request,
        arrival: int,
        tables: dict[str, BlockTable],
        decoder: Decoder | None = None,
        mask_id: int | None = None,
    ) -> None:
        self.request = request
        self.arrival = arrival
        self.due = 0
        """Place in the order of all, given by the scheduler."""
        self.deadline = None if request.timeout is None else time.monotonic() + request.timeout
        self.ids = [*request.prompt_ids, *request.output_ids]
        self.num_prompt = len(request.prompt_ids)
        self.num_computed = 0
        self.patching = Patching()
        self.documents = [0]
        """First byte of every document: behind each EOS."""
        self.patch_documents = [0]
        """First patch of every document: behind each patch that holds an EOS."""
        self.tables = tables
        self.mask_id = -1 if mask_id is None else mask_id
        self.stopping = StopMatcher(list(request.stop))
        self.counts: dict[int, int] = {}
        self.prompt_logprobs: list[TokenLogprob] = []
        self.cumulative_logprob = 0.0
        self.cost = Counts()
        """Of all rounds, the one under way included."""
        self.preemptions = 0
        self.num_traced = 0
        """Patch starts that a trace has told."""
        self.num_told = request.patches_from or 0
        """Ids whose entropies have been told, if any are."""
        self.num_counted = 0
        """Patch starts that `Counts.patches` has counted, or that lie before what this engine generates."""
        self.prefix: Node | None = None
        """How far the prefix cache knows its ids, if it takes part."""
        self.num_cached = 0
        """Ids of the prompt that it found there."""
        self.arrived = time.monotonic()
        self.begun: float | None = None
        """When its first step began."""
        self._decoder: Decoder = decoder or Autoregressive()
        self._round: Round | None = None
        self._call: Call | None = None
        self._note_documents(0)
        for token in request.output_ids:
            self.counts[token] = self.counts.get(token, 0) + 1

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first; see `Scheduler`."""
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
    def mean_patch(self) -> float:
        """Bytes per patch so far."""
        return max(self.patching.decided, 1) / len(self.patching.starts)

    @property
    def at_patch_start(self) -> bool:
        """Whether the next row to compute starts a patch."""
        return self.patching.starts[-1] == self.num_computed

    # Rounds.

    def next_call(self, room: int) -> Call:
        """What the round under way asks for; begins one if there is none (`room`: see `Decoder.round`)."""
        if self._call is None:
            self._round = self._decoder.round(self, room)
            self._call = next(self._round)
        return self._call

    def resume(self, result: Result) -> Committed | None:
        """Gives the round what it asked for; its outcome, if that was the end of it."""
        assert self._round is not None
        try:
            self._call = self._round.send(result)
        except StopIteration as end:
            self.drop_round()
            outcome: Committed = end.value
            return outcome
        return None

    def drop_round(self) -> None:
        """Forgets a round under way. Nothing of it has been committed."""
        self._round = self._call = None

    # Ids.

    def append(self, token: int) -> None:
        """Commits a generated id."""
        self.counts[token] = self.counts.get(token, 0) + 1
        self.extend((token,))

    def extend(self, ids: Iterable[int]) -> None:
        """Adds ids behind the committed ones, for a step to verify."""
        before = len(self.ids)
        self.ids += ids
        self._note_documents(before)

    def retract(self, end: int) -> None:
        """Takes back the ids from `end` on."""
        del self.ids[end:]
        while self.documents[-1] > end:
            self.documents.pop()

    def cut(self, computed: int) -> None:
        """Makes it as if only `computed` rows had run: later ones were fed ids that did not come to be."""
        self.num_computed = computed
        self.patching.cut(computed)
        closed = len(self.patching.starts) - 1
        while self.patch_documents[-1] > closed:
            self.patch_documents.pop()

    def _note_documents(self, start: int) -> None:
        self.documents += [i + 1 for i in range(start, len(self.ids)) if self.ids[i] == EOS_ID]

    # Patches.

    def note_patch_documents(self, begin: int, end: int) -> None:
        """A patch that holds an EOS, of those from `begin` up to `end`, ends a document for the global stage."""
        starts = self.patching.starts
        for patch in range(begin, end):
            behind = patch + 1
            if self.patch_documents[-1] < behind and EOS_ID in self.ids[starts[patch] : starts[behind]]:
                self.patch_documents.append(behind)

    def patch_of(self, byte: int) -> int:
        """Index of the patch that holds `byte`."""
        return bisect_right(self.patching.starts, byte) - 1

    def most_patches(self, end: int) -> int:
        """Most patches that are closed once rows up to `end` have run: an undecided byte may close one."""
        decided = self.patching.decided
        return self.patch_of(end) if end <= decided else self.patch_of(decided) + end - decided

    def usage(self, formula: PaperFormula) -> Usage:
        closing_eos = self.num_output > 0 and self.ids[-1] == EOS_ID and not self.request.ignore_eos
        cost = self.cost
        return Usage(
            prompt_tokens=self.num_prompt,
            completion_tokens=self.num_output - closing_eos,
            decoder_calls=cost.decoder_calls,
            global_calls=cost.global_calls,
            rounds=cost.rounds,
            drafted=cost.drafted,
            accepted=cost.accepted,
            rows=dict(cost.rows),
            estimated_bytes=round(formula.bytes(cost.decoder_calls, cost.global_calls)),
            bytes_read=round(sum(cost.bytes_read.values())),
            preemptions=self.preemptions,
            cached_tokens=self.num_cached,
            queue_seconds=(self.begun or time.monotonic()) - self.arrived,
        )
