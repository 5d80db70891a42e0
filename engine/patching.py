"""Where patches start: the rules of the entropy patcher, one byte at a time.

Whether byte i starts a patch depends only on the bytes before it, so every decision is taken once, when byte i - 1
arrives, and never revised (BLT 2.3; Fast BLT 3.4).
"""

import numpy as np

from .config import PatchingRule


class Patching:
    """The patch starts of one growing text.

    `starts` holds every decided patch start, ascending; the last may be the not yet existing next byte. `decided` is
    the number of bytes fed. Drafted bytes may be fed too, if `cut` takes them back when they are not right.
    """

    def __init__(self, rule: PatchingRule) -> None:
        self._rule = rule
        self._threshold = np.float32(rule.threshold)
        self._entropies: list[float] = []
        self.starts = [0]
        self.decided = 0

    def feed(self, entropy: float) -> bool:
        """Takes the entropy (nats) after the next byte; says whether the byte behind it starts a patch."""
        self.decided += 1
        byte = self.decided
        opens = self._exceeds(byte, entropy)
        limit = self._rule.max_patch_length
        if limit is not None and byte - self.starts[-1] >= limit:
            opens = True
        if opens:
            self.starts.append(byte)
        self._entropies.append(entropy)
        return opens

    def cut(self, decided: int) -> None:
        """Makes it as if only the first `decided` bytes had been fed."""
        if decided < self.decided:
            self.decided = decided
            del self._entropies[decided:]
            while self.starts[-1] > decided:
                self.starts.pop()

    def _exceeds(self, byte: int, entropy: float) -> bool:
        rule = self._rule
        previous = self._entropies[-1] if self._entropies else 0.0
        if rule.mode == "bytes" or byte == 1:
            return True
        if rule.monotonic:
            return byte == 2 or bool(entropy - previous > self._threshold)
        if rule.threshold_add is not None:
            rises = entropy - previous > rule.threshold_add
            return byte == 2 or (byte > 3 and rises and bool(entropy > self._threshold))
        return bool(entropy > self._threshold)
