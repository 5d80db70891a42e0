"""BLT-S: the decoder drafts ahead of the patches, a pass of the whole model verifies."""

from ..config import EOS_ID
from ..types import TokenLogprob
from .asks import Decoder, Draft, Round, SequenceView
from .phrases import drafting, one_byte, verify


class SelfSpeculation(Decoder):
    """Fast BLT 5.1, algorithm 2, with draft length k.

    Three things are better than in the paper. A draft reads the latents that the last round's verification left, so a
    round has one encoder and global pass instead of two. A drafted row before which no patch has closed has read the
    right latent: it is exact and not decoded again. And drafts can be sampled, not only greedy. Each position has its
    own random number, so draft and model agree whenever their distributions map it to the same byte. The text is what
    blt draws with this seed, byte for byte.
    """

    def __init__(self, draft_length: int) -> None:
        self.draft_length = draft_length

    def round(self, sequence: SequenceView, room: int) -> Round:
        k, until = drafting(sequence, room, self.draft_length)
        if k < 1:
            return (yield from one_byte())
        drafts: list[int] = []
        scores: list[TokenLogprob] = []
        while len(drafts) < k and EOS_ID not in drafts:
            result = yield Draft(tuple(drafts), at_most=k - len(drafts), then_verify=True, until=until)
            drafts += result.ids
            scores += result.scores
        return (yield from verify(drafts, exact=len(drafts), scores=scores))
