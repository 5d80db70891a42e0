"""The answer to a request: text that is certain, log-probabilities, traces, boundaries, and why it ends."""

from bisect import bisect_left
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING

from .config import BYTE_OFFSET, EOS_ID, is_byte, text_of
from .costs.accounting import PaperFormula
from .decoders import Committed
from .grammars import Constraint
from .stopping import StopMatcher
from .types import Delta, Finished, FinishReason, Request, TokenLogprob, Trace, Usage

if TYPE_CHECKING:
    from .sequence import Sequence


class Output:
    """The output of one request, as far as it was sent to the client."""

    def __init__(self, request: Request, constraint: Constraint | None = None) -> None:
        """constraint: has been fed the request's `output_ids`, but for the last."""
        self._request, self._constraint = request, constraint
        self._num_fed = len(request.output_ids[:-1])
        self._stopping = StopMatcher(request.stop, include=request.include_stop)
        self._stopped_by: bytes | int | None = None
        self._num_ids = 0
        self._prompt_scores: list[TokenLogprob] = []
        self._cumulative_logprob = 0.0
        self._num_traced: int | None = None
        """Patch starts that traces have reported."""
        self._num_counted: int | None = None
        """Patch starts that are counted, or that lie before what this engine generates."""
        self._num_decided = request.patches_from or 0
        """Ids whose entropies have been reported, if any are."""

    @property
    def num_scored(self) -> int:
        """Ids of the prompt that have been scored."""
        return len(self._prompt_scores)

    def take(self, ids: Iterable[int]) -> tuple[list[int], bytes, FinishReason | None]:
        """Takes committed ids up to where the request must end. Returns these, the bytes that became certain, and why
        it ends, if it does. Only bytes are text."""
        kept: list[int] = []
        text = b""
        for token in ids:
            # An earlier engine went on after those that are fed: none of them ended the text.
            constraint = self._constraint if self._num_ids >= self._num_fed else None
            kept.append(token)
            text += self._text(token)
            if token == EOS_ID and constraint and not constraint.may_end:
                return kept, text, "dead_end"
            if constraint:
                constraint.advance(token)
            ended = (token == EOS_ID and not self._request.ignore_eos) or (constraint and constraint.is_finished)
            if ended or self._stopped_by is not None:
                return kept, text, "stop"
            if self._num_ids == self._request.max_tokens:
                return kept, text, "length"
        return kept, text, None

    def _text(self, token: int) -> bytes:
        """Takes one id. Returns the bytes that it made certain, and notes whether it ends the output."""
        request = self._request
        self._num_ids += 1
        may_stop = self._num_ids > request.min_tokens
        if request.stop_ids and may_stop and token in request.stop_ids and (token != EOS_ID or request.ignore_eos):
            self._stopped_by = token
            return self._stopping.flush() + text_of([token] if request.include_stop else [])
        if not is_byte(token):
            return b""
        text, stop = self._stopping.feed(token - BYTE_OFFSET, may_stop=may_stop)
        self._stopped_by = stop or None
        return text

    def delta(self, sequence: "Sequence", outcome: Committed, ids: list[int], text: bytes) -> Delta:
        """The event for a round's ids, once they are committed. ids, text: of `take`."""
        scores = outcome.scores[: len(ids)]
        for score in scores:
            self._cumulative_logprob += score.logprob or 0.0
        entropies, starts = self._decisions(sequence)
        return Delta(
            id=self._request.id,
            ids=ids,
            text=text,
            logprobs=scores,
            traces=self._traces(sequence, outcome, len(ids)) if self._request.trace else [],
            entropies=entropies,
            patch_starts=starts,
        )

    def prompt_delta(self, sequence: "Sequence") -> Delta | None:
        """Of a request that generates nothing: the boundaries, if they are asked for."""
        if self._request.patches_from is None:
            return None
        entropies, starts = self._decisions(sequence)
        return Delta(id=self._request.id, entropies=entropies, patch_starts=starts)

    def score_prompt(self, scores: list[TokenLogprob]) -> Delta | None:
        """Takes scores of the prompt's next ids; returns their event once all have come."""
        self._prompt_scores += scores
        if not scores or len(self._prompt_scores) < len(self._request.prompt_ids):
            return None
        return Delta(id=self._request.id, prompt_logprobs=list(self._prompt_scores))

    def finished(self, reason: FinishReason, usage: Usage) -> Finished:
        """The last event. It releases what was held back, unless the client has left."""
        text = b"" if reason == "abort" else self._stopping.flush()
        return Finished(
            id=self._request.id,
            reason=reason,
            text=text,
            stopped_by=self._stopped_by,
            usage=usage,
            cumulative_logprob=self._cumulative_logprob,
        )

    def closed_patches(self, sequence: "Sequence", num_ids: int) -> list[int]:
        """For each patch that generated ids begin, if decided by now and not counted before: the bytes of the patch
        before it. num_ids: how many ids were committed last."""
        starts, before = sequence.patching.starts, self._num_counted
        if before is None:
            before = bisect_left(starts, len(sequence.ids) - num_ids)
        # A round that was cut has decided more.
        self._num_counted = end = bisect_left(starts, len(sequence.ids))
        return [after - start for start, after in pairwise(starts[before - 1 : end])]

    def _traces(self, sequence: "Sequence", outcome: Committed, num_ids: int) -> list[Trace]:
        starts, before = sequence.patching.starts, self._num_traced
        if before is None:
            before = bisect_left(starts, sequence.num_prompt)
        self._num_traced = end = bisect_left(starts, len(sequence.ids))
        patch_starts = [start - sequence.num_prompt for start in starts[before:end]]
        if outcome.rounds > 1:
            # Rounds of blt, which drafts nothing and commits a byte at a time.
            return [Trace(num_ids=1, patch_starts=patch_starts), *[Trace(num_ids=1)] * (num_ids - 1)]
        return [
            Trace(
                num_ids=count,
                drafts=list(part.drafts),
                accepted=part.accepted,
                passes=list(part.passes),
                patch_starts=[] if number else patch_starts,
            )
            for number, (part, count) in enumerate(outcome.up_to(num_ids))
        ]

    def _decisions(self, sequence: "Sequence") -> tuple[list[float], list[int]]:
        """Entropies and patch starts that have not been reported before, if they are asked for."""
        if self._request.patches_from is None:
            return [], []
        begin, patching = self._num_decided, sequence.patching
        # The last round may have decided more, but what is reported must not depend on the decoder.
        self._num_decided = end = min(patching.decided, max(len(sequence.ids) - 1, sequence.num_prompt))
        return patching.decisions(begin, end)


def usage_of(sequence: "Sequence", formula: PaperFormula, reason: FinishReason) -> Usage:
    """What a request that ends for this reason has cost."""
    ids, counts = sequence.ids, sequence.counts
    may_close = reason == "dead_end" or not sequence.request.ignore_eos
    closing_eos = sequence.num_output > 0 and ids[-1] == EOS_ID and may_close
    return Usage(
        prompt_tokens=sequence.num_prompt,
        completion_tokens=sequence.num_output - closing_eos,
        decoder_calls=counts.decoder_calls,
        global_calls=counts.global_calls,
        rounds=counts.rounds,
        drafted=counts.drafted,
        accepted=counts.accepted,
        rows=dict(counts.rows),
        estimated_bytes=round(formula.bytes(counts.decoder_calls, counts.global_calls)),
        bytes_read=round(sum(counts.bytes_read.values())),
        preemptions=sequence.preemptions,
        cached_tokens=sequence.num_cached,
        queue_seconds=sequence.queue_seconds,
        prefill_seconds=sequence.prefill_seconds,
        decode_seconds=sequence.decode_seconds,
    )
