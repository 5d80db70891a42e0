"""BLT-D: block diffusion."""

from ..types import TokenLogprob, Unmask
from .calls import Call, Committed, Round, SequenceView

DEFAULT_RULE = Unmask(rule="confidence", alpha=0.7)


class Diffusion:
    """Fast BLT 3.1, algorithm 1 without verification: a block of [MASK]s, unmasked by one decoder pass after another.

    The block reads the latent of the patch that is open at its beginning, as if it ended there. That latent is left out
    of what later patches see: a patch goes on where the entropies say. The bytes of the last block run as clean rows in
    the first pass over the next. With `finish_patch` bytes are decoded one by one until a patch ends, and only there a
    block begins, as in training.
    """

    def __init__(self, block_size: int, rule: Unmask, finish_patch: bool) -> None:
        self._block_size = block_size
        self._rule = rule
        self._finish_patch = finish_patch

    def round(self, sequence: SequenceView, room: int) -> Round:
        mask = sequence.mask_id
        if self._finish_patch:
            result = yield Call()
            if not sequence.at_patch_start:
                return Committed(result.after, result.after_scores)
        start, size = len(sequence.ids), self._block_size
        block = [mask] * size
        scores: list[TokenLogprob | None] = [None] * size
        passes = [0] * size
        number = 0
        while mask in block:
            result = yield Call(
                runs_clean=number == 0, wants=False, start=start, block=tuple(block), rule=self._rule, closes=True
            )
            block = result.cells
            for place, when in enumerate(result.settled):
                if when >= 0:
                    passes[place] = number + when
                    if result.cell_scores:
                        scores[place] = result.cell_scores[place]
            number += result.passes
        return Committed(block, [score for score in scores if score], block, size, passes)
