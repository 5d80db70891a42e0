"""One sequence in the engine: its ids, its patches, its pages and what it has cost."""

import time
from bisect import bisect_right

from .config import EOS_ID, PatchingRule
from .pages import BlockTable
from .patching import Patching
from .stopping import StopMatcher
from .types import Request, TokenLogprob, Usage


class Sequence:
    """The state of one request.

    `ids` is prompt plus output. `num_computed` rows of it have passed all stages and sit in the caches; a preempted
    sequence starts again from 0, with its patch starts kept, since a decided boundary is frozen.
    """

    def __init__(self, request: Request, arrival: int, rule: PatchingRule, tables: dict[str, BlockTable]) -> None:
        self.request = request
        self.arrival = arrival
        self.deadline = None if request.timeout is None else time.monotonic() + request.timeout
        self.ids = [*request.prompt_ids, *request.output_ids]
        self.num_prompt = len(request.prompt_ids)
        self.num_computed = 0
        self.patching = Patching(rule)
        self.documents = [0]
        """First byte of every document: behind each EOS."""
        self.patch_documents = [0]
        """First patch of every document: behind each patch that holds an EOS."""
        self.tables = tables
        self.stopping = StopMatcher(list(request.stop))
        self.counts: dict[int, int] = {}
        self.prompt_logprobs: list[TokenLogprob] = []
        self.cumulative_logprob = 0.0
        self.decoder_calls = 0
        self.global_calls = 0
        self.preemptions = 0
        for i, token in enumerate(self.ids):
            if token == EOS_ID:
                self.documents.append(i + 1)
        for token in request.output_ids:
            self.counts[token] = self.counts.get(token, 0) + 1

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first: lower priority value, then earlier arrival."""
        return self.request.priority, self.arrival

    @property
    def num_output(self) -> int:
        return len(self.ids) - self.num_prompt

    @property
    def remaining(self) -> int:
        """Rows to compute before the next id can be chosen."""
        return len(self.ids) - self.num_computed

    def append(self, token: int) -> None:
        self.ids.append(token)
        self.counts[token] = self.counts.get(token, 0) + 1
        if token == EOS_ID:
            self.documents.append(len(self.ids))

    def document_start(self, byte: int) -> int:
        """First byte of the document that holds `byte`; an EOS belongs to the document that it ends."""
        return self.documents[bisect_right(self.documents, byte) - 1]

    def patch_document_start(self, patch: int) -> int:
        return self.patch_documents[bisect_right(self.patch_documents, patch) - 1]

    def patch_of(self, byte: int) -> int:
        """Index of the patch that holds `byte`."""
        return bisect_right(self.patching.starts, byte) - 1

    def most_patches(self, end: int) -> int:
        """Most patches that are closed once rows up to `end` have run: an undecided byte may close one."""
        decided = self.patching.decided
        return self.patch_of(end) if end <= decided else self.patch_of(decided) + end - decided

    def usage(self) -> Usage:
        closing_eos = self.num_output > 0 and self.ids[-1] == EOS_ID and not self.request.ignore_eos
        return Usage(
            prompt_tokens=self.num_prompt,
            completion_tokens=self.num_output - closing_eos,
            decoder_calls=self.decoder_calls,
            global_calls=self.global_calls,
            preemptions=self.preemptions,
        )
