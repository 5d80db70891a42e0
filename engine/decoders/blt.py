"""BLT: one byte at a time."""

from typing import TYPE_CHECKING

from .calls import Call, Committed, Round

if TYPE_CHECKING:
    from ..sequence import Sequence


class Autoregressive:
    """Fast BLT 2.1. Every byte goes through patcher, encoder and decoder; one that ends a patch, through global too."""

    def round(self, sequence: "Sequence", room: int) -> Round:
        result = yield Call()
        return Committed(result.after, result.after_scores)
