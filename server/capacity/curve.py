"""How latency grows with the load of one replica, and how many replicas a load therefore needs.

Each replica is taken to get its share of the requests at random, as from a load balancer that knows nothing of them. A
router that knows how busy the replicas are does better.
"""

import math
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import active_children, get_context
from typing import Any

from engine.config import ModelConfig
from engine.simulation.costs import ReplicaCosts
from engine.simulation.load import Traffic, arrivals
from engine.simulation.replica import RequestLatency, saturation_rate, serve

from ..processors import usable_processors

SHARES = (0.05, 0.2, 0.4, 0.6, 0.75, 0.85, 0.92, 0.97)
"""Of the most that a replica can serve for long: the loads that are always simulated."""
BISECTIONS = 5
"""Loads tried between the two of these that enclose what is wanted."""
LEAST_REQUESTS = 400
"""Simulated for each load."""
BEYOND = 10
"""Least requests that are counted beyond the percentile: a figure of fewer is one of chance."""
TIMES_THE_PLACES = 8
"""Least requests, in sequences that run at once: fewer may end before the replica is as busy as it will be."""
BEGINNING, END = 0.15, 0.1
"""Shares of the requests that are not counted: the replica is not as busy then as it will be, or was."""


@dataclass(frozen=True, slots=True)
class LatencyTarget:
    """Seconds that this percentile of all requests may take at most, to the first byte and to the last; None for any
    time."""

    percentile: float
    first_byte: float | None
    last_byte: float | None


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds, from a request's arrival: the mean, the median and the percentile that was asked for."""

    mean: float
    median: float
    high: float


@dataclass(frozen=True, slots=True)
class LoadPoint:
    """A replica under load. rate: requests a second; share: of the most that it serves for long. running: mean
    sequences in its batch when a first byte came."""

    rate: float
    share: float
    first_byte: Latency
    last_byte: Latency
    running: float

    def meets(self, wanted: LatencyTarget) -> bool:
        most = ((self.first_byte, wanted.first_byte), (self.last_byte, wanted.last_byte))
        return all(limit is None or found.high <= limit for found, limit in most)


@dataclass(frozen=True, slots=True)
class Capacity:
    """points: ascending by rate. best: the highest load that gives what is wanted; replicas: needed for `rate` requests
    a second."""

    points: list[LoadPoint]
    best: LoadPoint
    replicas: int
    rate: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Simulated:
    """A replica and what it is asked. patch: mean bytes. num_requests: simulated for each load."""

    config: ModelConfig
    costs: ReplicaCosts
    patch: float
    traffic: Traffic
    percentile: float
    num_requests: int

    def saturation_rate(self) -> float:
        """Requests a second that the replica serves for long. Takes as long as a load. Raises ValueError for lengths
        that it cannot hold."""
        return saturation_rate(self.config, self.costs, self.patch, arrivals(self.traffic, 1.0, self.num_requests))

    def at(self, share: float, most: float) -> LoadPoint:
        """Under that share of `most`. Raises ValueError for lengths that the replica cannot hold."""
        rate, count = share * most, self.num_requests
        served = serve(self.config, self.costs, self.patch, arrivals(self.traffic, rate, count))
        counted = served[round(BEGINNING * count) : round((1 - END) * count)]
        first, last = (latency(times, self.percentile) for times in _columns(counted))
        return LoadPoint(rate, share, first, last, sum(one.running for one in counted) / len(counted))


def capacity(simulated: Simulated, wanted: LatencyTarget, rate: float, tell: Callable[[int], None]) -> Capacity:
    """tell: gets how many loads have been simulated, of `num_loads()`. Raises ValueError if no load gives what is
    wanted.

    Only loads below the most that a replica serves for long are tried: the latencies of a higher one grow for as long
    as it lasts, and say nothing.
    """
    most = simulated.saturation_rate()
    points = []
    for point in _all_at(simulated, SHARES, most):
        points.append(point)
        tell(len(points))
    if not points[0].meets(wanted):
        raise ValueError(f"even an idle replica takes longer than is wanted: {_explained(points[0], wanted)}")
    best = next((low for low, high in zip(points, points[1:], strict=False) if not high.meets(wanted)), points[-1])
    high = next((point.share for point in points if point.share > best.share), best.share)
    while high > best.share and len(points) < num_loads():
        tried = simulated.at((best.share + high) / 2, most)
        points.append(tried)
        tell(len(points))
        best, high = (tried, high) if tried.meets(wanted) else (best, tried.share)
    points.sort(key=lambda point: point.rate)
    return Capacity(points, best, math.ceil(rate / best.rate - 1e-9), rate)


def enough_requests(percentile: float, max_sequences: int) -> int:
    """To tell a percentile of a replica with so many places."""
    counted = BEYOND / (1 - percentile / 100) / (1 - BEGINNING - END)
    return max(LEAST_REQUESTS, math.ceil(counted - 1e-9), TIMES_THE_PLACES * max_sequences)


def num_loads() -> int:
    """Most that are simulated."""
    return len(SHARES) + BISECTIONS


def _all_at(simulated: Simulated, shares: Sequence[float], most: float) -> Iterator[LoadPoint]:
    """In processes of their own, as many at a time as there are processors for."""
    cores = min(usable_processors(), len(shares))
    if cores == 1:
        yield from (simulated.at(share, most) for share in shares)
        return
    others = active_children()
    with ProcessPoolExecutor(cores, get_context("spawn")) as pool:
        try:
            # The processes inherit it: Ctrl-C at a terminal is for this one, which ends them.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                points = [pool.submit(simulated.at, share, most) for share in shares]
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for point in points:
                yield point.result()
        except BaseException:
            # After Ctrl-C, too, nobody waits for loads that may take a minute each.
            for process in active_children():
                if process not in others:
                    process.terminate()
            raise


def latency(seconds: Iterable[float], percentile: float) -> Latency:
    ascending = sorted(seconds)
    return Latency(sum(ascending) / len(ascending), _at(ascending, 50), _at(ascending, percentile))


def _at(ascending: Sequence[float], percentile: float) -> float:
    """The least value that this share of all does not exceed."""
    return ascending[max(math.ceil(percentile / 100 * len(ascending)) - 1, 0)]


def _columns(served: Sequence[RequestLatency]) -> tuple[list[float], list[float]]:
    return [one.first_byte for one in served], [one.last_byte for one in served]


def _explained(point: LoadPoint, wanted: LatencyTarget) -> str:
    found = {"first byte": (point.first_byte, wanted.first_byte), "last byte": (point.last_byte, wanted.last_byte)}
    parts = [
        f"its {name} takes {one.high:.3g} s (p{wanted.percentile:g}), {limit:g} s are wanted"
        for name, (one, limit) in found.items()
        if limit is not None and one.high > limit
    ]
    return " and ".join(parts)
