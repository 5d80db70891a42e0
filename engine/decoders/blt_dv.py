"""BLT-DV: block diffusion drafts, a pass of the whole model verifies."""

from ..types import Unmask
from .blt import one_byte
from .calls import Call, Round, SequenceView, verified

DEFAULT_RULE = Unmask(rule="one_step")


class Verified:
    """Fast BLT 5.2: a block as in BLT-D, then Verify as in BLT-S.

    As there, a round has one encoder and global pass: the block reads the latents that the last verification left. Its
    first pass takes the last committed byte along as a causal row, which gives the block's first byte by next-byte
    prediction. That is exact unless a patch closes there, and a better guess than the diffusion's in any case.
    """

    def __init__(self, block_size: int, rule: Unmask) -> None:
        self._block_size = block_size
        self._rule = rule

    def round(self, sequence: SequenceView, room: int) -> Round:
        end, size = len(sequence.ids), min(self._block_size, room - 1, sequence.tokens_left - 1)
        if sequence.remaining > 1 or not sequence.num_computed or size < 1:
            return (yield from one_byte())
        mask = sequence.mask_id
        block = [mask] * size
        passes = [0] * size
        number = 0
        causal = sequence.ids[-1:]
        while mask in block:
            start = end - len(causal)
            result = yield Call(
                runs_clean=False, wants=False, start=start, causal=causal, block=tuple(block), rule=self._rule
            )
            block, causal = result.cells, []
            for place, when in enumerate(result.settled):
                if when >= 0:
                    passes[place] = number + when
            number += result.passes
        # The row before the block has been decoded as blt would have.
        decoded = 0 if sequence.request.logprobs is not None else end
        return verified(sequence, block, (yield Call(drafts=block, decoded=decoded)), passes)
