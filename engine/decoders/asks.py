"""What a round asks of the stages, and what it gets back.

Positions are places in the text. Row j is fed byte j and predicts byte j + 1.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from collections.abc import Sequence as Seq
from typing import Protocol

import msgspec

from ..counts import Counts
from ..types import Request, TokenLogprob, UnmaskRule


class Next(msgspec.Struct, frozen=True):
    """The byte after the text: all rows not yet computed run through all stages.

    at_most: bytes that may come back, more than one only where the device goes on by itself. Each further byte takes
    one more row, and may close a patch.
    """

    at_most: int = 1


class Draft(msgspec.Struct, frozen=True):
    """A guess at the byte after the text and the `known` drafts: a row of the decoder alone (of the encoder too, where
    the decoder reads its states), against the newest latent.

    at_most: bytes that may come back, each from a row that is fed the one before. then_verify: the round ends with the
    verification of all drafts, which may come back too once there are no more to make; and after it further rounds
    with as many drafts, whose first draft is the byte at a position before `until`.
    """

    known: Seq[int] = ()
    at_most: int = 1
    then_verify: bool = False
    until: int = 0


class Unmask(msgspec.Struct, frozen=True):
    """Passes of the decoder over a block after the text. Its cells see each other; [MASK]s among them become bytes by
    the rule.

    lead: the last byte of the text runs along as a causal row, and gives the block's first byte. close_patch: rows not
    yet computed run first through all stages, and the block reads the latent of the open patch as if it ended there;
    without, the newest latent there is. then_verify: as in `Draft`, once no [MASK] is left. until: as there too; a
    round without verification ends with its block.
    """

    block: Seq[int]
    rule: UnmaskRule
    lead: bool = False
    close_patch: bool = False
    then_verify: bool = False
    until: int = 0


class Verify(msgspec.Struct, frozen=True):
    """How many of the drafts the model itself would give, and the byte that it gives after those: the last row of the
    text and the drafts run through all stages. That last row must not have run, so `Next` cannot come before it in a
    round.

    exact: how many of these rows the decoder has run already while drafting, reading the newest latent. They are exact
    up to the first that closes a patch, and the decoder skips them that far.
    """

    drafts: Seq[int]
    exact: int = 0


Ask = Next | Draft | Unmask | Verify


class Result(msgspec.Struct, frozen=True):
    """What the model gives for an ask, drawn with the random numbers that belong to each place.

    ids: of Next and Draft the bytes that follow; of Unmask the block as it is now; of Verify the byte after the
    accepted drafts. accepted: of Verify. settled: of Unmask, for each cell the one of the `passes` in which it became a
    byte, -1 if in none. scores: only if the request asked for log-probabilities; of Verify up to the byte after the
    accepted drafts, without those of rows that were skipped, of Unmask those of the bytes that the cells would have
    become. verified: of Draft and Unmask, what the round's Verify gave, if it has run too. later: of the last ask of a
    round, the outcomes of further rounds that have run too. failed: whether logits were no distribution (NaN, +inf, or
    nothing above -inf); the sequence ends there, and nothing else of the result counts.
    """

    ids: list[int] = []
    accepted: int = 0
    settled: list[int] = []
    passes: int = 1
    scores: list[TokenLogprob] = []
    verified: "Result | None" = None
    later: "list[Committed]" = []
    failed: bool = False


class Committed(msgspec.Struct, frozen=True):
    """The outcome of a round: the ids that follow.

    drafts: what was drafted, or decoded as a block; accepted: how many of these, from the first on, are among `ids`.
    passes: of a block, in which pass each cell was settled, from 0 on. rounds: how many rounds of one byte it stands
    for. parts: the rounds that it stands for, if several have drafted; `ids` are those of all, the rest is theirs.
    """

    ids: list[int]
    scores: list[TokenLogprob]
    drafts: Seq[int] = ()
    accepted: int = 0
    passes: Seq[int] = ()
    rounds: int = 1
    parts: Seq["Committed"] = ()

    @property
    def drafted(self) -> int:
        return len(self.drafts)

    def up_to(self, count: int) -> Iterator[tuple["Committed", int]]:
        """The rounds that its first `count` ids are from, each with how many; at least one."""
        for part in self.parts or (self,):
            yield part, min(len(part.ids), count)
            count -= len(part.ids)
            if count <= 0:
                return


Round = Generator[Ask, Result, Committed]


class SequenceView(Protocol):
    """What a decoder may know of its sequence; see `engine.sequence.Sequence`."""

    @property
    def request(self) -> Request: ...

    @property
    def ids(self) -> list[int]: ...

    @property
    def num_computed(self) -> int: ...

    @property
    def remaining(self) -> int: ...

    @property
    def tokens_left(self) -> int: ...

    @property
    def at_patch_start(self) -> bool: ...

    @property
    def mean_patch(self) -> float: ...

    @property
    def mask_id(self) -> int: ...

    @property
    def counts(self) -> Counts: ...


class Decoder(ABC):
    """Makes rounds for one sequence."""

    def choose(self, sequence: SequenceView) -> None:  # noqa: B027
        """Decides how the next round goes; most decoders have no choice. Called when the sequence comes and after every
        round."""

    @abstractmethod
    def round(self, sequence: SequenceView, room: int) -> Round:
        """A round after the ids that are committed now; up to `room` rows may run through all stages, drafts among
        them."""
