"""BLT-DV: block diffusion drafts, a pass of the whole model verifies."""

from ..types import UnmaskRule
from .asks import Decoder, Round, SequenceView
from .phrases import denoise, drafting, one_byte, verify

DEFAULT_RULE = UnmaskRule(rule="one_step")


class VerifiedDiffusion(Decoder):
    """Fast BLT 5.2: a block as in BLT-D, then Verify as in BLT-S.

    As in BLT-S, a round has one encoder and global pass: the block reads the latents that the last verification left.
    The last byte of the text leads in the block's first pass and predicts the block's first byte. That is exact unless
    a patch closes there, and always a better guess than the diffusion's.
    """

    def __init__(self, block_size: int, rule: UnmaskRule) -> None:
        self._block_size = block_size
        self._rule = rule

    def round(self, sequence: SequenceView, room: int) -> Round:
        size, until = drafting(sequence, room, self._block_size)
        if size < 1:
            return (yield from one_byte())
        block = yield from denoise(sequence, size, self._rule, lead=True, then_verify=True, until=until)
        return (yield from verify(block.ids, exact=1, scores=block.scores, passes=block.passes))
