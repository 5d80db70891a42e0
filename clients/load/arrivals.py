"""When requests arrive, whether or not earlier ones have been answered."""

import random
from collections.abc import Iterator


def poisson(rate: float, seed: int) -> Iterator[float]:
    """Seconds from the start, of arrivals that know nothing of each other; `rate` a second on average."""
    draw = random.Random(f"arrivals {seed} {rate}")
    at = 0.0
    while True:
        at += draw.expovariate(rate)
        yield at
