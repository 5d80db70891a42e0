"""One sequence's share of one step: the scheduler makes it, the stages read it, the ledger bills it."""

from collections.abc import Sequence as Seq

import msgspec

from .decoders import Ask, Draft, Next, Unmask, Verify
from .sequence import Sequence
from .types import TokenLogprob


class Rows(msgspec.Struct, kw_only=True):
    """Rows of the text, start..end-1, run through all stages. Then cells, from `cells_start` on, run through the
    decoder alone (through the encoder too, where the decoder reads its states); the last `num_block` of them see each
    other.

    Their ids are on the device (`engine.memory.text`). Drafts that a step verifies have rows of the text too, after
    those of `sequence.ids`.
    """

    sequence: Sequence
    start: int
    end: int
    ask: Ask | None = None
    """None for rows before the ask, which only fill the caches."""
    num_cells: int = 0
    cells_start: int = 0
    num_block: int = 0
    drawn_from: int = 0
    """First row of the text after which a byte is drawn, `end` for none."""
    logits_from: int = 0
    """First row of the text whose logits are wanted: `drawn_from`, or before it for the scores of a prompt."""
    decode_from: int = 0
    """First row of the text that the decoder runs. All three increase once the step knows which rows it may skip."""
    counted_from: int = 0
    """Rows from here on belong to generation: they are not a prompt's, nor computed for a second time."""
    prompt_scores: list[TokenLogprob] = []
    """What the step gives for the prompt's ids, if the request asked."""

    @property
    def may_run_ahead(self) -> bool:
        """Whether the next byte may be drawn before the host has read the one before: it needs no grammar, and the
        prompt is not being scored."""
        return not (self.sequence.constraint or self.sequence.scores_prompt)

    @property
    def is_scored(self) -> bool:
        """Whether the log-probabilities of the bytes that it draws are wanted."""
        return self.ask is not None and self.sequence.request.logprobs is not None

    @property
    def is_plain(self) -> bool:
        """Whether, in addition, no byte is drawn otherwise than the one before: there are no penalties, and
        `min_tokens` is reached."""
        request, done = self.sequence.request, self.sequence.num_output
        return self.may_run_ahead and not request.sampling.is_penalised and done >= request.min_tokens

    @classmethod
    def prefill(cls, sequence: Sequence, end: int) -> "Rows":
        """Rows of the text up to `end`."""
        return cls._make(sequence, None, end, end)

    @classmethod
    def of(cls, sequence: Sequence, ask: Ask) -> "Rows":
        """All rows of an ask, after the rows of the text that are not computed yet."""
        start, end = sequence.num_computed, len(sequence.ids)
        match ask:
            case Next():
                return cls._make(sequence, ask, end, end - 1)
            case Verify():
                return cls._make(sequence, ask, end + len(ask.drafts), max(start, end - 1))
            case Draft():
                rows = cls._make(sequence, ask, start, start)
                rows.num_cells, rows.cells_start = 1, end - 1 + len(ask.known)
            case Unmask():
                text = end if ask.close_patch else start
                rows = cls._make(sequence, ask, text, text)
                rows.num_block = len(ask.block)
                rows.num_cells, rows.cells_start = ask.lead + len(ask.block), end - ask.lead
        return rows

    @classmethod
    def _make(cls, sequence: Sequence, ask: Ask | None, end: int, drawn_from: int) -> "Rows":
        start = sequence.num_computed
        logits_from = start if sequence.scores_prompt else drawn_from
        counted_from = max(sequence.num_prompt - 1, sequence.patching.decided)
        return cls(
            sequence=sequence,
            start=start,
            end=end,
            ask=ask,
            drawn_from=drawn_from,
            logits_from=logits_from,
            decode_from=start,
            counted_from=counted_from,
        )

    @property
    def num_text(self) -> int:
        return self.end - self.start

    @property
    def given(self) -> Seq[int]:
        """The ids after the text that the ask brings along."""
        match self.ask:
            case Draft(ids) | Unmask(ids) | Verify(ids):
                return ids
            case _:
                return ()

    @property
    def num_decided(self) -> int:
        """Rows of the text whose boundaries are known: they run for a second time."""
        return min(max(self.sequence.patching.decided - self.start, 0), self.num_text)

    @property
    def num_rows(self) -> int:
        return self.end - self.start + self.num_cells

    def most_passes(self, num_bytes: int) -> int:
        """Passes of the decoder that the ask can need, if blt may run up to `num_bytes`; no verification counts."""
        match self.ask:
            case Next(at_most):
                return min(at_most, num_bytes)
            case Draft(at_most=at_most):
                return at_most
            case Unmask(block, rule):
                # A pass settles a cell at least, and all of them by one rule.
                return 1 if rule.rule == "one_step" else len(block)
            case _:
                return 1

    @property
    def reach(self) -> int:
        """The position after the last row that the ask may lead to."""
        if isinstance(self.ask, Draft):
            return self.cells_start + self.ask.at_most
        return self.cells_start + self.num_cells if self.num_cells else self.end

    @property
    def closes_patch(self) -> bool:
        """Whether cells read the open patch as if it ended with the text."""
        return isinstance(self.ask, Unmask) and self.ask.close_patch

    @property
    def num_logits(self) -> int:
        return self.end - self.logits_from + self.num_cells

    @property
    def num_skipped(self) -> int:
        """Of Verify: drafts that stand unchecked, because the decoder skips the rows before them."""
        return self.drawn_from - self.end + len(self.ask.drafts) + 1 if isinstance(self.ask, Verify) else 0

    @property
    def num_exact(self) -> int:
        """Of Verify: rows that were exact while they drafted, as long as no patch closes, so that the decoder skips
        them. None unless the step begins with them."""
        ask = self.ask
        return ask.exact if isinstance(ask, Verify) and self.start == self.end - len(ask.drafts) - 1 else 0

    @property
    def num_drawn(self) -> int:
        return self.end - self.drawn_from + self.num_cells if self.ask else 0

    @property
    def drawn_places(self) -> list[int]:
        """Where in the text each drawn byte stands: a block's cell at its own place, any other row's one further."""
        causal = self.cells_start + self.num_cells - self.num_block
        return [
            *range(self.drawn_from + 1, self.end + 1),
            *range(self.cells_start + 1, causal + 1),
            *range(causal, causal + self.num_block),
        ]
