"""What a round asks of the stages, and what it gets back."""

from collections.abc import Generator, Sequence
from typing import Protocol

import msgspec

from ..counts import Counts
from ..types import Request, TokenLogprob, Unmask


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
    def cost(self) -> Counts: ...


class Call(msgspec.Struct, frozen=True):
    """The rows of one sequence in one step. Positions are byte indices; row j is fed byte j.

    Clean rows run through all stages: from the first that has not, up to the committed ids and the `drafts` behind
    them. `cells` run through the decoder alone (and the encoder, where the decoder reads its states), behind the clean
    rows of the same call or where `start` says.
    """

    runs_clean: bool = True
    drafts: Sequence[int] = ()
    """Run as clean rows, or, without those, the text between the committed ids and the cells."""
    decoded: int = 0
    """Clean rows before this one have been through the decoder as drafts did, reading the newest latent: they are exact
    up to the first that closes a patch, and the decoder skips them so far."""
    wants: bool = True
    """Whether the bytes behind the clean rows are wanted: all from the first decoded one on with drafts, else the
    last."""
    start: int = 0
    causal: Sequence[int] = ()
    """Ids of cells that see what is before them and read the newest latent; the byte behind each is wanted."""
    ahead: int = 0
    """How many passes may follow at once, each over the byte that the one before gave: with a single causal cell, over
    cells; of clean rows without drafts, over a clean row each, for as long as that closes no patch."""
    block: Sequence[int] = ()
    """Ids of cells, [MASK]s among them, behind the causal ones, that see each other too; their own bytes are wanted."""
    rule: Unmask | None = None
    """Which of the block's [MASK]s become bytes after a pass. The first cell of a block becomes, in any case, what a
    causal cell before it gives."""
    closes: bool = False
    """The block reads the latent of the open patch, as if that ended with the clean rows; without, the newest latent
    that is there."""

    @property
    def num_cells(self) -> int:
        return len(self.causal) + len(self.block)


class Result(msgspec.Struct, frozen=True):
    """What the model's law gives, drawn with the random numbers that belong to each position.

    first: position of the first clean row in `after`. after: the byte behind each wanted clean row, then behind each
    causal cell, then what passes `ahead` gave. right: how many drafts, from the one behind row `first` on, are what the
    model gives. cells: the block as it is now; settled: of each cell, in which of the
    `passes` that were run it became a byte, -1 if in none. The scores are there only if the request asked for
    log-probabilities; those of cells say what each would have become.
    """

    first: int = 0
    after: list[int] = []
    right: int = 0
    cells: list[int] = []
    settled: list[int] = []
    passes: int = 1
    after_scores: list[TokenLogprob] = []
    cell_scores: list[TokenLogprob] = []


class Committed(msgspec.Struct, frozen=True):
    """The outcome of a round: the ids that follow.

    drafts: what was drafted, or decoded as a block; accepted: how many of these, from the first on, are among `ids`.
    passes: of a block, in which pass each cell was settled, from 0 on. rounds: how many it makes up for.
    """

    ids: list[int]
    scores: list[TokenLogprob]
    drafts: Sequence[int] = ()
    accepted: int = 0
    passes: Sequence[int] = ()
    rounds: int = 1

    @property
    def drafted(self) -> int:
        return len(self.drafts)


Round = Generator[Call, Result, Committed]


class Decoder(Protocol):
    """Makes rounds for one sequence."""

    def round(self, sequence: SequenceView, room: int) -> Round:
        """A round behind the ids that are committed now; `room` clean rows may run, drafts among them."""
        ...


def verified(sequence: SequenceView, drafts: Sequence[int], result: Result, passes: Sequence[int] = ()) -> Committed:
    """The drafts up to the first that is not what the model gives, then the model's own byte (Fast BLT, Verify).

    Rows before `result.first` were exact when they drafted, so the bytes behind them stand.
    """
    end = len(sequence.ids)
    unchecked = result.first - (end - 1)
    right = unchecked + result.right
    ids = [*drafts[:right], result.after[result.right]]
    return Committed(ids, result.after_scores[: len(ids)], drafts, right, passes)
