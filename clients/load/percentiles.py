"""Percentiles, of values and of counts of values."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

PERCENTILES = (50, 90, 95, 99)
GROWTH = math.log(1.01)
"""Of one bucket of `Gaps` over the next: 1 %."""
SHORTEST = 1e-6


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Between the two nearest values in proportion, as numpy does; `ordered` must not be empty."""
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def spread(values: Iterable[float]) -> dict[str, float] | None:
    """count, mean, percentiles and max; None without values."""
    ordered = sorted(values)
    if not ordered:
        return None
    shares = {f"p{percent}": percentile(ordered, percent) for percent in PERCENTILES}
    return {"count": len(ordered), "mean": math.fsum(ordered) / len(ordered), **shares, "max": ordered[-1]}


class Gaps:
    """Times between chunks, counted in buckets 1 % wide: a stream has too many to keep them all."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self._sum = self._max = 0.0

    def add(self, seconds: float) -> None:
        self._counts[math.floor(math.log(max(seconds, SHORTEST)) / GROWTH)] += 1
        self._sum += seconds
        self._max = max(self._max, seconds)

    def spread(self) -> dict[str, float] | None:
        """As of the function, but percentiles are true to within 1 %."""
        count = self._counts.total()
        if not count:
            return None
        shares = {f"p{percent}": self._percentile(math.ceil(count * percent / 100)) for percent in PERCENTILES}
        return {"count": count, "mean": self._sum / count, **shares, "max": self._max}

    def _percentile(self, rank: int) -> float:
        """The value that `rank` values, from 1, do not exceed."""
        seen = 0
        for bucket in sorted(self._counts):
            seen += self._counts[bucket]
            if seen >= rank:
                break
        return min(self._max, math.exp((bucket + 0.5) * GROWTH))
