"""Rounds under a grammar: bytes that it forces are drafts that need no pass of their own."""

from typing import Protocol

from ..types import MAX_DRAFT
from .asks import Decoder, Round, SequenceView
from .phrases import can_draft, verify


class Forcing(Protocol):
    """See `engine.grammars.Constraint`."""

    def forced(self, most: int) -> list[int]: ...


class Constrained(Decoder):
    """Any decoder, but where the grammar allows a single text for the next bytes, these are verified at once.

    The model's own choice among one byte is that byte, so they stand, and the round commits one byte more. The masks
    themselves apply to every row that chooses a byte: see `engine.step.results`.
    """

    def __init__(self, inner: Decoder, constraint: Forcing) -> None:
        self._inner, self._constraint = inner, constraint

    def choose(self, sequence: SequenceView) -> None:
        self._inner.choose(sequence)

    def round(self, sequence: SequenceView, room: int) -> Round:
        most = min(room - 1, sequence.tokens_left - 1, MAX_DRAFT)
        if most > 0 and can_draft(sequence) and (forced := self._constraint.forced(most)):
            return (yield from verify(forced, exact=0))
        return (yield from self._inner.round(sequence, room))
