"""Requests that come at random, as those of many people who know nothing of each other."""

import random
from math import exp, log, sqrt
from typing import NamedTuple

TRAFFIC_SEED = 0


class Traffic(NamedTuple):
    """Mean lengths in bytes. spread: standard deviation of a length, in means; lengths are log-normal."""

    prompt_bytes: float
    output_bytes: float
    spread: float


class Arrival(NamedTuple):
    """at: seconds after the first. Both lengths are at least 1."""

    at: float
    prompt_bytes: int
    output_bytes: int


def arrivals(traffic: Traffic, rate: float, count: int) -> list[Arrival]:
    """A Poisson process of `rate` requests a second. Any rate has the same lengths, and the same order of gaps."""
    draw = random.Random(TRAFFIC_SEED)
    at, found = 0.0, list[Arrival]()
    for _ in range(count):
        gap, prompt, output = draw.expovariate(1.0), draw.gauss(), draw.gauss()
        found.append(
            Arrival(at, _length(traffic.prompt_bytes, traffic.spread, prompt),
                    _length(traffic.output_bytes, traffic.spread, output))
        )  # fmt: skip
        at += gap / rate
    return found


def _length(mean: float, spread: float, normal: float) -> int:
    variance = log(1 + spread**2)
    return max(round(mean * exp(normal * sqrt(variance) - variance / 2)), 1)
