"""BLT-D: block diffusion."""

from ..types import UnmaskRule
from .asks import Committed, Decoder, Next, Round, SequenceView
from .phrases import denoise, joined

DEFAULT_RULE = UnmaskRule(rule="confidence", alpha=0.7)


class BlockDiffusion(Decoder):
    """Fast BLT 3.1, algorithm 1 without verification: a block of [MASK]s, unmasked by one decoder pass after another.

    The block reads the latent of the open patch, as if that ended where the block begins. Later patches do not see this
    latent: the entropies alone decide where a patch ends. The bytes of the last block run as rows of the text in the
    first pass over the next. With `finish_patch` bytes are decoded one by one until a patch ends, and a block only
    begins there, as in training.
    """

    def __init__(self, block_size: int, rule: UnmaskRule, finish_patch: bool) -> None:
        self._block_size = block_size
        self._rule = rule
        self._finish_patch = finish_patch

    def round(self, sequence: SequenceView, room: int) -> Round:
        if self._finish_patch:
            result = yield Next()
            if not sequence.at_patch_start:
                return Committed(result.ids, result.scores)
        until = min(sequence.num_computed + room + 1, len(sequence.ids) + sequence.tokens_left)
        until = 0 if self._finish_patch else until
        block = yield from denoise(sequence, self._block_size, self._rule, close_patch=True, until=until)
        own = Committed(block.ids, block.scores, block.ids, len(block.ids), block.passes)
        return joined(own, block.later)
