"""Where patches start in a growing text.

Whether byte i starts a patch depends only on the bytes before it, so every decision is taken once, when byte i - 1
arrives, and never revised (BLT 2.3; Fast BLT 3.4). `kernels.boundary` decides; this is the record of it.
"""

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence

from kernels.boundary import Rule

from .config import PatchingRule


def boundary_rule(rule: PatchingRule) -> Rule:
    """The checkpoint's rule as the kernel takes it."""
    return Rule(
        threshold=rule.threshold,
        rise=rule.threshold_add,
        monotonic=rule.monotonic,
        every_byte=rule.mode == "bytes",
        longest=rule.max_patch_length or 0,
    )


class Patching:
    """The patch starts of one growing text.

    `starts` holds every decided patch start, ascending; the last may be the not yet existing next byte. `decided` is
    the number of bytes fed, `entropies` the entropy (nats, float32) behind each of them. Drafted bytes may be fed too,
    if `cut` takes them back when they are not right.
    """

    def __init__(self) -> None:
        self.entropies = array("f")
        self.starts = [0]
        self.decided = 0

    @property
    def last_entropy(self) -> float:
        """Entropy (nats) behind the byte before the last; 0 at the beginning."""
        return self.entropies[-1] if self.entropies else 0.0

    def take(self, entropies: Sequence[float], opens: Sequence[bool]) -> None:
        """Takes, of the next bytes, the entropy behind each, and whether the byte behind it starts a patch."""
        self.starts += [byte for byte, start in enumerate(opens, self.decided + 1) if start]
        self.decided += len(opens)
        self.entropies.extend(entropies)

    def decisions(self, begin: int, end: int) -> tuple[list[float], list[int]]:
        """The entropies behind bytes begin..end-1, and the starts that follow from them; byte 0 goes with the first."""
        first = bisect_right(self.starts, begin) if begin else 0
        return self.entropies[begin:end].tolist(), self.starts[first : bisect_right(self.starts, end)]

    def resume(self, starts: Iterable[int], entropies: "array[float]") -> None:
        """Takes over what was decided elsewhere for the same text: all starts but the first, and the entropies. Does
        nothing if as much is decided here."""
        if self.decided < len(entropies):
            self.decided, self.starts, self.entropies = len(entropies), [0, *starts], entropies

    def cut(self, decided: int) -> None:
        """Makes it as if only the first `decided` bytes had been fed."""
        if decided < self.decided:
            self.decided = decided
            del self.entropies[decided:]
            while self.starts[-1] > decided:
                self.starts.pop()
