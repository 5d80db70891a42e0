"""Compiles kernels and records graphs before the first request comes, which would otherwise wait for both."""

import logging
import time
from typing import TYPE_CHECKING

from .config import BOS_ID
from .costs.calibration import PROMPT
from .step.graphs import MOST_RECORDINGS, padded
from .types import Request, SamplingParams

if TYPE_CHECKING:
    from .engine import Engine

log = logging.getLogger("fastblt.engine")

PROMPT_IDS = 24
NEW_IDS = 64
"""Ids that each request generates: several rounds of every decoder."""
PROGRESS_SECONDS = 5.0


def warm_up(engine: "Engine", seconds: float) -> int:
    """Runs requests of every decoder, greedy and sampled, in batches of every size that is recorded, the smallest
    first; the engine is otherwise unchanged. Begins no batch once `seconds` have passed, or half of all recordings that
    are kept were made. Returns how many were made. Compiled kernels stay in Triton's cache for the next start;
    recordings do not."""
    executor, decoders = engine.stepper.executor, engine.limits.decoders
    if not executor.records or not seconds:
        return 0
    sizes = sorted({min(padded(n), engine.config.max_sequences) for n in range(1, engine.config.max_sequences + 1)})
    batches = [(size, decoder) for size in sizes for decoder in decoders if decoder != "auto"]
    began = reported = time.monotonic()
    before = executor.num_recorded
    with engine.rehearsing():
        for number, (size, decoder) in enumerate(batches):
            if time.monotonic() - began > seconds or executor.num_recorded - before > MOST_RECORDINGS // 2:
                log.warning(
                    "warmed up for %d of %d batches; the first of each other will be slow", number, len(batches)
                )
                break
            if time.monotonic() - reported > PROGRESS_SECONDS:
                reported = time.monotonic()
                log.info("warming up: %d of %d batches, %d recordings", number, len(batches), executor.num_recorded)
            _run(engine, size, decoder)
    made = executor.num_recorded - before
    log.info("warmed up in %.1f s: %d recordings", time.monotonic() - began, made)
    return made


def _run(engine: "Engine", size: int, decoder: str) -> None:
    """Two batches, of texts that differ: how many patches close in a step depends on them."""
    length = min(PROMPT_IDS, engine.limits.max_length // 2)
    room = min(NEW_IDS, engine.limits.max_length - length)
    for temperature in (0.0, 1.0):
        for number in range(size):
            begin = 1 + 7 * number % (len(PROMPT) - length)
            request = Request(
                id=f"warm-up-{number}",
                prompt_ids=[BOS_ID, *PROMPT[begin : begin + length - 1]],
                max_tokens=room,
                ignore_eos=True,
                decoder=decoder,
                sampling=SamplingParams(temperature=temperature, seed=number),
            )
            engine.add(request)
        while engine.has_work:
            engine.step()
