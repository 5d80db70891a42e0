"""BLT: one byte at a time."""

from .calls import Call, Committed, Round, SequenceView


class Autoregressive:
    """Fast BLT 2.1. Every byte goes through patcher, encoder and decoder; one that ends a patch, through global too."""

    def round(self, sequence: SequenceView, room: int) -> Round:
        result = yield Call()
        return Committed(result.after, result.after_scores)
