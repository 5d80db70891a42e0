"""How fast decoders are on this machine, beside how fast its memory is."""

import time
from dataclasses import dataclass
from typing import Any

from ..config import BOS_ID, BYTE_OFFSET
from ..engine import Engine
from ..types import DecoderName, Delta, Failed, Request, SamplingParams
from .texts import PROMPTS, stop

EXACTLY: dict[str, Any] = {"sampling": SamplingParams(temperature=0), "ignore_eos": True}
TOGETHER = 16
MOST_BYTES = 4096
WARM_SECONDS, MOST_SECONDS = 2.0, 4.0
"""Seconds of a run that is not measured, in which kernels are compiled and graphs recorded, and most of one that is."""
ROOM = 64
"""Positions left free after the longest text, for drafts and blocks."""


@dataclass(frozen=True, slots=True)
class Speed:
    """bytes_read: per second, as the engine counts them; of_copy: over what a plain copy moves per second."""

    decoder: str
    sequences: int
    bytes_per_second: float
    bytes_read_per_second: float
    of_copy: float


def runs(engine: Engine) -> list[tuple[DecoderName, int]]:
    """Each decoder alone, and blt with many sequences."""
    names = [name for name in engine.limits.decoders if name != "auto"]
    return [*((name, 1) for name in names), ("blt", min(TOGETHER, engine.config.max_sequences))]


def measure(engine: Engine, decoder: DecoderName, sequences: int, seconds: float, copy: float) -> Speed:
    """seconds: that this may take. copy: bytes per second of a copy."""
    warm = min(WARM_SECONDS, seconds / 3)
    _run(engine, decoder, sequences, warm)
    count, took, read = _run(engine, decoder, sequences, min(MOST_SECONDS, seconds - warm))
    return Speed(decoder, sequences, count / took, read / took, read / took / copy)


def _run(engine: Engine, decoder: DecoderName, sequences: int, seconds: float) -> tuple[int, float, int]:
    """Bytes generated, seconds, and bytes read since all had begun. Raises RuntimeError if a request fails."""
    prompt = [BOS_ID, *(byte + BYTE_OFFSET for byte in b"".join(PROMPTS))]
    most = min(MOST_BYTES, engine.limits.max_length - len(prompt) - ROOM)
    names = [str(number) for number in range(sequences)]
    for name in names:
        engine.add(Request(id=name, prompt_ids=prompt, max_tokens=most, decoder=decoder, **EXACTLY))
    silent, started, count, began, before = {*names}, False, 0, 0.0, 0
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, Failed):
                raise RuntimeError(f"{decoder}: {event.message}")
            if isinstance(event, Delta):
                count += len(event.ids)
                silent.discard(event.id)
        if not started:
            # The step that ends the last prompt is not measured either.
            started, count, began = not silent, 0, time.monotonic()
            before = sum(engine.snapshot().bytes_read.values())
        elif time.monotonic() - began > seconds:
            break
    took, read = time.monotonic() - began, sum(engine.snapshot().bytes_read.values()) - before
    stop(engine, names)
    return count, took, read
