"""Parts of rounds that several decoders share: one byte, a block denoised, drafts verified."""

from collections.abc import Generator
from collections.abc import Sequence as Seq
from itertools import chain

import msgspec
from msgspec.structs import replace

from ..config import EOS_ID
from ..types import TokenLogprob, UnmaskRule
from .asks import Ask, Committed, Draft, Next, Result, Round, SequenceView, Unmask, Verify


def single(inner: Round) -> Round:
    """A round that no other follows in its step: for decoders that change the outcome of another's."""
    try:
        ask = next(inner)
        while True:
            bounded = replace(ask, until=0) if isinstance(ask, Draft | Unmask) else ask
            ask = inner.send((yield Next() if isinstance(ask, Next) else bounded))
    except StopIteration as end:
        outcome: Committed = end.value
        return outcome


class Denoised(msgspec.Struct, frozen=True):
    """A block without [MASK]s. passes: in which pass each cell was settled, from 0 on. later: the outcomes of further
    rounds that have run too."""

    ids: list[int]
    passes: list[int]
    scores: list[TokenLogprob]
    later: list[Committed]


def one_byte() -> Round:
    """A round of blt, where drafts cannot begin."""
    result = yield Next()
    return Committed(result.ids, result.scores)


def can_draft(sequence: SequenceView) -> bool:
    """Whether a verification, or the prompt, has left a latent to draft from: one row is to compute."""
    return sequence.remaining == 1 and sequence.num_computed > 0


def drafting(sequence: SequenceView, room: int, most: int) -> tuple[int, int]:
    """How many drafts the next round makes, `most` unless less is left, and its `until`: see `Draft`."""
    left = min(room, sequence.tokens_left)
    size = min(most, left - 1) if can_draft(sequence) else 0
    return size, len(sequence.ids) + left - size


def denoise(
    sequence: SequenceView,
    size: int,
    rule: UnmaskRule,
    *,
    lead: bool = False,
    close_patch: bool = False,
    then_verify: bool = False,
    until: int = 0,
) -> Generator[Ask, Result, Denoised]:
    """Unmasks a block of [MASK]s, pass after pass (Fast BLT 3.1, algorithm 1). lead, close_patch,
    then_verify, until: see `Unmask`; a lead runs in the first pass alone."""
    mask = sequence.mask_id
    block, passes, number = [mask] * size, [0] * size, 0
    scores: list[TokenLogprob | None] = [None] * size
    later: list[Committed] = []
    while mask in block:
        result = yield Unmask(tuple(block), rule, lead and not number, close_patch, then_verify, until)
        block, later = result.ids, result.later
        for cell, settled in enumerate(result.settled):
            if settled >= 0:
                passes[cell] = number + settled
                if result.scores:
                    scores[cell] = result.scores[cell]
        number += result.passes
    return Denoised(block, passes, [score for score in scores if score], later)


def verify(drafts: Seq[int], exact: int, scores: Seq[TokenLogprob] = (), passes: Seq[int] = ()) -> Round:
    """Lets the model verify drafts: commits those up to the first that it would not give, then its own byte (Fast BLT,
    Verify). exact: see `Verify`; scores: of the exact drafts, if they are wanted; passes: see `Committed`."""
    if EOS_ID in drafts:
        # Bytes after an EOS may not see those before it.
        drafts = drafts[: drafts.index(EOS_ID) + 1]
    result = yield Verify(drafts, exact=min(exact, len(drafts)))
    ids = [*drafts[: result.accepted], *result.ids]
    # Rows that are skipped have been scored while they drafted.
    skipped = len(ids) - len(result.scores) if result.scores else 0
    own = Committed(ids, [*scores[:skipped], *result.scores], drafts, result.accepted, passes[: len(drafts)])
    return joined(own, result.later)


def joined(first: Committed, later: Seq[Committed]) -> Committed:
    """Rounds of one step as one outcome."""
    parts = [first, *later]
    return Committed([*chain.from_iterable(part.ids for part in parts)], [], parts=parts) if later else first
