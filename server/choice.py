"""Turns the events of one sequence into pieces of one choice: text, log-probabilities, trace, patches, finish reason.

A response without streaming is the sum of the same pieces, so both agree.
"""

import math
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass, field
from itertools import islice

import msgspec

from engine.config import BYTE_OFFSET, EOS_ID, PatchingRule, is_byte, text_of
from engine.types import Delta, Finished, FinishReason, TokenLogprob, Usage

from .schemas import MAX_LOGPROBS, Logprobs, Patches, Trace, TraceRound
from .text import OffsetTracker, Utf8Stream
from .token_names import token_name


@dataclass
class Piece:
    """What one event made final."""

    text: str = ""
    data: bytes | None = None
    """What `text` was decoded from, if asked for."""
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    trace: Trace | None = None
    patches: Patches | None = None

    @property
    def is_empty(self) -> bool:
        shown = self.text or self.finish_reason or self.logprobs and self.logprobs.tokens
        also = self.prompt_token_ids or self.token_ids or self.prompt_logprobs
        return not (shown or also or self.trace and self.trace.rounds or self.patches and self.patches.entropies)

    @property
    def is_scored(self) -> bool:
        """Whether it may be long beside its text."""
        return any((self.logprobs, self.prompt_logprobs, self.trace, self.patches))

    def add(self, other: "Piece") -> None:
        self.text += other.text
        if self.data is not None and other.data:
            self.data += other.data
        self.finish_reason, self.stop_reason = other.finish_reason, other.stop_reason
        self.prompt_token_ids = self.prompt_token_ids or other.prompt_token_ids
        self.prompt_logprobs = self.prompt_logprobs or other.prompt_logprobs
        if self.token_ids is not None and other.token_ids:
            self.token_ids += other.token_ids
        if self.logprobs and other.logprobs:
            self.logprobs.tokens += other.logprobs.tokens
            self.logprobs.token_logprobs += other.logprobs.token_logprobs
            self.logprobs.top_logprobs += other.logprobs.top_logprobs
            self.logprobs.text_offset += other.logprobs.text_offset
            self.logprobs.bytes += other.logprobs.bytes
        if self.trace and other.trace:
            self.trace.rounds += other.trace.rounds
            self.trace.patch_starts += other.trace.patch_starts
            self.trace.text_bytes += other.trace.text_bytes
        if self.patches and other.patches:
            self.patches.add(other.patches)


def _at_most(entry: TokenLogprob, num_top: int) -> TokenLogprob:
    if len(entry.top) <= num_top:
        return entry
    return msgspec.structs.replace(entry, top=dict(islice(entry.top.items(), num_top)))


def empty_patches(rule: PatchingRule, num_prompt: int) -> Patches:
    """No patches yet, for a prompt of `num_prompt` ids."""
    by_entropy = rule.mode == "entropy"
    return Patches(
        output_start=num_prompt,
        threshold=rule.threshold if by_entropy and not rule.monotonic else None,
        rise=(rule.threshold if rule.monotonic else rule.threshold_add) if by_entropy else None,
        max_patch_length=rule.max_patch_length if by_entropy else 1,
    )


@dataclass
class ChoiceStream:
    """Takes a sequence's events in order. Log-probabilities and entropy of a generated id are reported once its byte is
    in the text; those of a stop string never are, and the rest at the end. Ids and traces are reported at once."""

    prompt_ids: list[int]
    echo: bool
    with_logprobs: bool
    with_trace: bool = False
    patching: PatchingRule | None = None
    """The model's, if patches are to be reported."""
    with_ids: bool = False
    with_bytes: bool = False
    num_top: int = MAX_LOGPROBS
    """Most alternatives of an entry of `logprobs`."""
    num_prompt_top: int | None = None
    """Alternatives of an entry of `prompt_logprobs`; None reports none."""
    usage: Usage = field(default_factory=Usage)
    cumulative_logprob: float = 0.0
    num_generated: int = 0
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self._utf8 = Utf8Stream()
        self._offsets = OffsetTracker()
        self._owes_prompt = self.echo
        self._owes_prompt_ids = self.with_ids
        self._owes_prompt_scores = self.num_prompt_top is not None
        self._num_text_bytes = 0
        self._num_certain_bytes = 0
        self._num_shown_bytes = 0
        self._last_patch_start = -1
        self._last_id: int | None = None
        self._hidden: deque[TokenLogprob] = deque()
        self._num_certain_ids = len(self.prompt_ids)
        self._num_entropies = 0
        self._entropies: list[float] = []
        self._starts: list[int] = []

    @property
    def num_tokens(self) -> int:
        """Generated ids as the usage counts them: a closing end-of-sequence id is none."""
        if self.finish_reason:
            return self.usage.completion_tokens
        return self.num_generated - (self._last_id == EOS_ID)

    @property
    def mean_logprob(self) -> float:
        """Of no id: less than any."""
        return self.cumulative_logprob / self.num_generated if self.num_generated else -math.inf

    def empty_piece(self) -> Piece:
        return Piece(
            data=b"" if self.with_bytes else None,
            logprobs=Logprobs() if self.with_logprobs else None,
            token_ids=[] if self.with_ids else None,
            trace=Trace() if self.with_trace else None,
            patches=empty_patches(self.patching, len(self.prompt_ids)) if self.patching else None,
        )

    def feed(self, event: Delta | Finished) -> Piece:
        piece = self.empty_piece()
        if self._owes_prompt_ids:
            self._owes_prompt_ids = False
            piece.prompt_token_ids = self.prompt_ids
        finished = isinstance(event, Finished)
        prompt_scores = event.prompt_logprobs if isinstance(event, Delta) else []
        if finished and (self._owes_prompt or self._owes_prompt_scores):
            # A timeout came before the prompt was scored.
            prompt_scores = [TokenLogprob(i, None, {}) for i in self.prompt_ids]
        fed = self._utf8.pending
        if self._owes_prompt and (prompt_scores or not self.with_logprobs):
            self._owes_prompt = False
            prompt = text_of(self.prompt_ids)
            piece.text, fed = self._utf8.feed(prompt), fed + prompt
            if self.with_logprobs:
                for entry in prompt_scores:
                    self._show(piece, entry)
        if self._owes_prompt_scores and prompt_scores:
            self._owes_prompt_scores = False
            piece.prompt_logprobs = [_at_most(entry, self.num_prompt_top or 0) for entry in prompt_scores]
        piece.text += self._utf8.feed(event.text)
        self._num_text_bytes += len(event.text)
        if isinstance(event, Delta):
            if self.with_ids:
                piece.token_ids = list(event.ids)
            self.num_generated += len(event.ids)
            self._last_id = event.ids[-1] if event.ids else self._last_id
            self._hidden += event.logprobs
            if self.patching and not event.logprobs:
                # Entropies wait with their ids too.
                self._hidden += [TokenLogprob(i, None, {}) for i in event.ids]
        if isinstance(event, Finished):
            piece.text += self._utf8.finish()
            self.finish_reason = piece.finish_reason = event.reason
            by = event.stopped_by
            piece.stop_reason = by.decode(errors="replace") if isinstance(by, bytes) else by
            self.usage, self.cumulative_logprob = event.usage, event.cumulative_logprob
        if self.with_bytes:
            piece.data = (fed + event.text).removesuffix(self._utf8.pending)
        before = self._num_certain_bytes
        # Pending bytes may be the prompt's.
        self._num_certain_bytes = max(self._num_text_bytes - self._utf8.num_pending, 0)
        if piece.trace:
            piece.trace.text_bytes = self._num_certain_bytes - before
            if isinstance(event, Delta):
                self._trace(piece.trace, event)
        self._show_certain(piece)
        if piece.patches:
            self._add_patches(piece.patches, event)
        return piece

    def _trace(self, trace: Trace, event: Delta) -> None:
        at = 0
        for done in event.traces:
            ids = event.ids[at : at + done.num_ids]
            trace.rounds.append(TraceRound(ids=ids, drafts=done.drafts, accepted=done.accepted, passes=done.passes))
            at += done.num_ids
            for start in done.patch_starts:
                # A restarted engine reports all patches again.
                if start > self._last_patch_start:
                    self._last_patch_start = start
                    trace.patch_starts.append(start)

    def _add_patches(self, patches: Patches, event: Delta | Finished) -> None:
        """Adds patches of the prompt, and of those generated ids that are in the text."""
        if isinstance(event, Delta):
            # Nine digits identify a float32.
            self._entropies += [float(f"{entropy:.9g}") for entropy in event.entropies]
            self._starts += event.patch_starts
        new = self._num_certain_ids - self._num_entropies
        patches.entropies, self._entropies = self._entropies[:new], self._entropies[new:]
        self._num_entropies += len(patches.entropies)
        started = bisect_right(self._starts, self._num_entropies)
        patches.starts, self._starts = self._starts[:started], self._starts[started:]

    def _show_certain(self, piece: Piece) -> None:
        """Reports the ids whose bytes are in the text by now, and the ids between them that are not bytes."""
        while self._hidden:
            specials = 0
            while specials < len(self._hidden) and not is_byte(self._hidden[specials].id):
                specials += 1
            if specials == len(self._hidden):
                # Whether these belong to the choice depends on what follows: perhaps a stop string.
                if piece.finish_reason is None:
                    return
            elif self._num_shown_bytes >= self._num_certain_bytes:
                return
            else:
                self._num_shown_bytes += 1
                specials += 1
            self._num_certain_ids += specials
            for _ in range(specials):
                self._show(piece, self._hidden.popleft())

    def _show(self, piece: Piece, entry: TokenLogprob) -> None:
        shown = piece.logprobs
        if shown is None:
            return
        entry = _at_most(entry, self.num_top)
        shown.tokens.append(token_name(entry.id))
        shown.token_logprobs.append(entry.logprob)
        shown.top_logprobs.append(entry)
        byte = entry.id - BYTE_OFFSET if is_byte(entry.id) else None
        shown.text_offset.append(self._offsets.end if byte is None else self._offsets.feed(byte))
        shown.bytes.append(byte)
