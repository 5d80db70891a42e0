"""BLT: one byte at a time."""

from .calls import Call, Committed, Round, SequenceView


class Autoregressive:
    """Fast BLT 2.1. Every byte goes through patcher, encoder and decoder; one that ends a patch, through global too."""

    def round(self, sequence: SequenceView, room: int) -> Round:
        # Where the next step could be the last that fits, it is known only behind it whether there is another.
        spare = min(sequence.tokens_left - 1, room - sequence.remaining)
        result = yield Call(ahead=max(spare, 0))
        return Committed(result.after, result.after_scores, rounds=len(result.after))


def one_byte() -> Round:
    """A round of another decoder where that cannot begin."""
    result = yield Call()
    return Committed(result.after, result.after_scores)
