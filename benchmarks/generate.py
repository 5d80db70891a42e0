"""Runs prompts through an engine and measures the generation, without the prompts."""

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from engine.config import BOS_ID, BYTE_OFFSET, Policy
from engine.decoders import Decoder
from engine.engine import Engine
from engine.types import Delta, Failed, Request, SamplingParams, Snapshot

from .report import ROOT

GREEDY = SamplingParams(temperature=0)
TEXT = ROOT / "benchmarks" / "code.txt"
"""Python of an earlier version of this project. models/nano was not trained on it."""

Wrap = Callable[[Request], Decoder]
"""Makes a decoder that replaces a request's own."""


@dataclass(frozen=True, slots=True)
class Reading:
    """texts: the ids generated per prompt. The rest counts from when all of them had begun: seconds, steps and the
    seconds in them, seconds, rows and calls per stage, and the engine's counts for their decoder."""

    texts: list[list[int]]
    seconds: float
    steps: int
    step_seconds: float
    stage_seconds: dict[str, float]
    rows: dict[str, int]
    committed: int
    rounds: int
    decoder_calls: int
    global_calls: int
    bytes_read: int
    calls: dict[str, int] = field(default_factory=dict)

    @property
    def bytes_per_second(self) -> float:
        return self.committed / self.seconds

    @property
    def host_cost(self) -> float:
        """The share of the steps outside the stages."""
        return 1 - sum(self.stage_seconds.values()) / self.step_seconds

    @property
    def read_per_byte(self) -> float:
        """Bytes read for every byte generated, as the engine counts them."""
        return self.bytes_read / self.committed


def prompts(count: int, length: int) -> list[list[int]]:
    """Prompts as ids, from line starts of a fixed text, so that different commits measure the same prompts."""
    draw = random.Random(0)
    source = TEXT.read_bytes()
    starts = [draw.randrange(len(source) - 2 * length) for _ in range(count)]
    begins = [source.index(b"\n", start) + 1 for start in starts]
    return [[BOS_ID, *(byte + BYTE_OFFSET for byte in source[b : b + length])] for b in begins]


def begin(engine: Engine, requests: Sequence[Request], wrap: Wrap | None = None) -> None:
    """Adds the requests and steps until all of them have generated something."""
    for request in requests:
        engine.add(request, wrap(request) if wrap else None)
    silent = {request.id for request in requests}
    while silent:
        for event in engine.step():
            if isinstance(event, Failed):
                raise RuntimeError(event.message)
            silent.discard(event.id)


def abandon(engine: Engine, requests: Sequence[Request]) -> None:
    """Aborts them, and leaves the engine idle."""
    for request in requests:
        engine.abort(request.id)
    while engine.has_work:
        engine.step()


@contextmanager
def as_served(engine: Engine) -> Iterator[None]:
    """The engine meanwhile runs as in a server's process (`engine.process.child`): calibrated, so that it knows what
    may run ahead, and without garbage collections that scan all that was loaded. It must not have had a request
    yet."""
    engine.calibrate()
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def running_ahead(engine: Engine, policy: Policy) -> Iterator[None]:
    """The engine runs ahead by that policy meanwhile."""
    ahead = engine.stepper.ahead
    before, ahead.policy = ahead.policy, policy
    try:
        yield
    finally:
        ahead.policy = before


def generate(
    engine: Engine, prompts: Sequence[Sequence[int]], count: int, how: dict[str, Any], wrap: Wrap | None = None
) -> Reading:
    """Generates `count` ids greedily after each prompt, all prompts at the same time."""
    requests = [
        Request(id=str(i), prompt_ids=list(p), max_tokens=count, sampling=GREEDY, ignore_eos=True, **how)
        for i, p in enumerate(prompts)
    ]
    for request in requests:
        engine.add(request, wrap(request) if wrap else None)
    decoder = requests[0].decoder
    texts: list[list[int]] = [[] for _ in prompts]
    began, start = 0.0, Snapshot()
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, Failed):
                raise RuntimeError(event.message)
            if isinstance(event, Delta):
                texts[int(event.id)] += event.ids
        if not began and all(texts):
            start, began = engine.snapshot(), time.perf_counter()
    seconds, end = time.perf_counter() - began, engine.snapshot()
    before, counts = start.decoders[decoder], end.decoders[decoder]
    return Reading(
        texts,
        seconds,
        end.steps - start.steps,
        end.step_seconds - start.step_seconds,
        {stage: seconds - start.stage_seconds[stage] for stage, seconds in end.stage_seconds.items()},
        {stage: rows - start.rows[stage] for stage, rows in end.rows.items()},
        committed=counts.committed - before.committed,
        rounds=counts.rounds - before.rounds,
        decoder_calls=counts.calls["decoder"] - before.calls.get("decoder", 0),
        global_calls=counts.calls["global"] - before.calls.get("global", 0),
        bytes_read=sum(counts.bytes_read.values()) - sum(before.bytes_read.values()),
        calls={stage: calls - start.calls[stage] for stage, calls in end.calls.items()},
    )
