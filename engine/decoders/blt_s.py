"""BLT-S: the decoder drafts ahead of the patches, a pass of the whole model verifies."""

from ..config import EOS_ID
from .blt import one_byte
from .calls import Call, Round, SequenceView, verified


class Draft:
    """Fast BLT 5.1, algorithm 2, with draft length k.

    Three things are better than there. A draft reads the latents that the last round's verification left, so a round
    has one encoder and global pass instead of two. A drafted row that turns out to read the right latent, because no
    patch has closed before it, is exact and is not decoded again. And drafts are drawn, not only maximised: with the
    random number that belongs to a position, draft and model agree whenever their laws put that number on the same
    byte, so the text is what blt draws with this seed, byte for byte.
    """

    def __init__(self, draft_length: int) -> None:
        self._draft_length = draft_length

    def round(self, sequence: SequenceView, room: int) -> Round:
        end, k = len(sequence.ids), min(self._draft_length, room - 1, sequence.tokens_left - 1)
        if sequence.remaining > 1 or not sequence.num_computed or k < 1:
            return (yield from one_byte())
        text = [sequence.ids[-1]]
        while len(text) <= k:
            known, row = len(text), end - 2 + len(text)
            result = yield Call(
                runs_clean=False, wants=False, drafts=text[1:-1], start=row, causal=text[-1:], ahead=k - known
            )
            text += result.after
            if EOS_ID in result.after:
                # What follows may not see what was before.
                del text[text.index(EOS_ID, known) + 1 :]
                break
        drafts = text[1:]
        # Scores must come from one pass of the whole model.
        decoded = 0 if sequence.request.logprobs is not None else end - 1 + len(drafts)
        return verified(sequence, drafts, (yield Call(drafts=drafts, decoded=decoded)))
