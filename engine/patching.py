"""Where patches start in a growing text.

Whether byte i starts a patch depends only on the bytes before it, so every decision is taken once, when byte i - 1
arrives, and never revised (BLT 2.3; Fast BLT 3.4). `kernels.boundary` decides; this is the record of it.
"""

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
    the number of bytes fed. Drafted bytes may be fed too, if `cut` takes them back when they are not right.
    """

    def __init__(self) -> None:
        self._entropies: list[float] = []
        self._first = 0
        """The byte behind which the first of them stands."""
        self.starts = [0]
        self.decided = 0

    @property
    def last_entropy(self) -> float:
        """Entropy (nats) behind the byte before the last; 0 at the beginning."""
        return self._entropies[-1] if self._entropies else 0.0

    def take(self, entropies: Sequence[float], opens: Sequence[bool]) -> None:
        """Takes, of the next bytes, the entropy behind each, and whether the byte behind it starts a patch."""
        self.starts += [byte for byte, start in enumerate(opens, self.decided + 1) if start]
        self.decided += len(opens)
        self._entropies += entropies

    def entropy_behind(self, byte: int) -> float | None:
        """None if the byte was decided elsewhere."""
        return self._entropies[byte - self._first] if byte >= self._first else None

    def resume(self, decided: int, starts: Iterable[int], entropy: float) -> None:
        """Takes over what was decided elsewhere for the same text: all starts but the first, the last entropy. Does
        nothing if as much is decided here."""
        if self.decided < decided:
            self.decided, self.starts = decided, [0, *starts]
            self._entropies, self._first = [entropy], decided - 1

    def cut(self, decided: int) -> None:
        """Makes it as if only the first `decided` bytes had been fed."""
        if decided < self.decided:
            self.decided = decided
            del self._entropies[decided - self._first :]
            while self.starts[-1] > decided:
                self.starts.pop()
