"""BLT: one byte after another, several in a round where the device needs no host in between."""

from .asks import Committed, Decoder, Next, Round, SequenceView


class Autoregressive(Decoder):
    """Fast BLT 2.1. Every byte goes through patcher, encoder and decoder; one that ends a patch, through global too."""

    def round(self, sequence: SequenceView, room: int) -> Round:
        # The last row that fits may close the last patch that fits: whether it does is only known after it.
        spare = min(sequence.tokens_left - 1, room - sequence.remaining)
        result = yield Next(at_most=1 + max(spare, 0))
        return Committed(result.ids, result.scores, rounds=len(result.ids))
