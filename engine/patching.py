"""Where patches start in a growing text.

Whether byte i starts a patch depends only on the bytes before it. So every decision is made once, when byte i - 1
arrives, and never revised (BLT 2.3; Fast BLT 3.4). `kernels.boundary` decides; this file keeps the decisions.
"""

from array import array
from bisect import bisect_right
from collections.abc import Iterable
from collections.abc import Sequence as Seq

from kernels.boundary import Rule

from .config import PatchingRule


def boundary_rule(rule: PatchingRule) -> Rule:
    """The checkpoint's rule in the kernel's form."""
    return Rule(
        threshold=rule.threshold,
        rise=rule.threshold_add,
        monotonic=rule.monotonic,
        every_byte=rule.mode == "bytes",
        longest=rule.max_patch_length or 0,
    )


class Patching:
    """The patch starts of one growing text.

    `starts` holds every decided patch start, ascending; the last may be the next byte, which does not exist yet.
    `decided` is the number of bytes fed, `entropies` the entropy (nats, float32) after each of them. Drafts may be fed
    too, if `cut` takes back those that are rejected.
    """

    def __init__(self) -> None:
        self.entropies = array("f")
        self.starts = [0]
        self.decided = 0

    def take(self, entropies: Seq[float], opens: Seq[bool]) -> None:
        """Takes the entropy after each of the next bytes, and whether the byte after it starts a patch."""
        self.starts += [byte for byte, start in enumerate(opens, self.decided + 1) if start]
        self.decided += len(opens)
        self.entropies.extend(entropies)

    def decisions(self, begin: int, end: int) -> tuple[list[float], list[int]]:
        """The entropies after bytes begin..end-1, and the starts that they decide; byte 0 comes with the first."""
        first = bisect_right(self.starts, begin) if begin else 0
        return self.entropies[begin:end].tolist(), self.starts[first : bisect_right(self.starts, end)]

    def resume(self, starts: Iterable[int], entropies: "array[float]") -> None:
        """Takes over decisions of another sequence with the same text: all starts but the first, and the entropies.
        Does nothing if as many bytes are decided here."""
        if self.decided < len(entropies):
            self.decided, self.starts, self.entropies = len(entropies), [0, *starts], entropies

    def cut(self, decided: int) -> None:
        """Forgets all but the first `decided` bytes."""
        if decided < self.decided:
            self.decided = decided
            del self.entropies[decided:]
            while self.starts[-1] > decided:
                self.starts.pop()
