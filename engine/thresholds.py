"""Which threshold gives patches of a wanted mean length: an exact search over known entropies.

As the threshold rises, patches can only merge. A limit on their length cuts a merged patch into no more pieces than
there were before. So the mean length is a step function that never falls. Its steps are at the judged values, and
bisecting these finds the best threshold.
"""

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .config import PatchingRule

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Calibration:
    """A threshold (nats, or nats of rise under a monotonic rule) and the mean length of patches in bytes under it."""

    threshold: float
    mean_patch: float


class Thresholds:
    """Thresholds of a rule, and the mean patch length of some texts under each: the number of bytes divided by the
    number of patches that begin with a byte. BOS, a patch of its own, is left out."""

    def __init__(self, rule: PatchingRule, texts: Iterable[Floats]) -> None:
        """texts: for each, the entropies (nats) after BOS and after every byte, (bytes + 1,) float32.

        Raises ValueError for the mode "bytes", and if there is no byte.
        """
        if rule.mode == "bytes":
            raise ValueError("every byte of this model is a patch of its own: there is no threshold")
        judged = [_judged(rule, entropies.astype(np.float32)) for entropies in texts]
        self._judged = np.concatenate([np.empty(0, np.float32), *judged])
        if not len(self._judged):
            raise ValueError("the texts hold no byte")
        self._longest = rule.max_patch_length
        self.judged: Floats = self._judged[np.isfinite(self._judged)]
        """The value compared with the threshold, for every byte that the threshold decides about."""
        self._steps = np.unique(self.judged)

    @property
    def num_bytes(self) -> int:
        return len(self._judged)

    @property
    def range(self) -> tuple[float, float]:
        """The least and the greatest mean length that a threshold gives."""
        return self._at_step(0), self._at_step(len(self._steps))

    def mean_patch(self, threshold: float) -> float:
        """Bytes per patch; compared in float32, as the engine does."""
        starts = np.flatnonzero(self._judged > np.float32(threshold))
        if self._longest is None:
            return self.num_bytes / len(starts)
        lengths = np.diff(starts, append=self.num_bytes)
        return self.num_bytes / int((-(-lengths // self._longest)).sum())

    def nearest(self, wanted: float) -> Calibration:
        """The threshold whose mean length is nearest to `wanted`, with as few digits as give the same patches."""
        steps = range(len(self._steps) + 1)
        at = bisect_left(steps, wanted, key=self._at_step)
        best = min(steps[max(at - 1, 0) : at + 1], key=lambda step: abs(self._at_step(step) - wanted))
        return Calibration(self._threshold(best), self._at_step(best))

    def _at_step(self, step: int) -> float:
        """The mean length if the `step` smallest values start no patch."""
        return self.mean_patch(float(self._steps[step - 1]) if step else -np.inf)

    def _threshold(self, step: int) -> float:
        """A threshold for `_at_step`: at least the last of these values, and below the next."""
        if not len(self._steps):
            return 0.0
        if step == 0:
            first = float(self._steps[0])
            return _short(np.float32(0.0 if first > 0 else first - 1), self._steps[0])
        if step == len(self._steps):
            return _short(self._steps[-1], self._steps[-1] + np.float32(1))
        return _short(self._steps[step - 1], self._steps[step])


def _judged(rule: PatchingRule, entropies: Floats) -> Floats:
    """For every byte the value that is compared with the threshold to decide whether it starts a patch: infinite if it
    always does, minus infinite if it never does (see `kernels.boundary.starts_patch`)."""
    values = entropies[:-1].copy()
    rises = np.diff(values)
    if rule.monotonic:
        values[1:] = rises
    elif rule.threshold_add is not None:
        values[1:][rises <= np.float32(rule.threshold_add)] = -np.inf
        values[2:3] = -np.inf
    values[:1] = np.inf
    if rule.monotonic or rule.threshold_add is not None:
        values[1:2] = np.inf
    return values


def _short(low: np.float32, high: np.float32) -> float:
    """The shortest decimal number that is `low` or more, and less than `high`, as a float32."""
    middle = (float(low) + float(high)) / 2
    for digits in range(1, 10):
        if low <= np.float32(value := round(middle, digits)) < high:
            return value
    return float(low)
