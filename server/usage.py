"""What the sequences of a request cost together."""

from collections import Counter
from typing import Any

from engine.types import DecoderName, Usage

from .schemas import FastBltUsage

COUNTS = "decoder_calls", "global_calls", "rounds", "drafted", "accepted", "preemptions"
BYTES = "estimated_bytes", "bytes_read"
"""Reported, as COUNTS are, as sums over a request's sequences."""
SECONDS = "queue_seconds", "prefill_seconds", "decode_seconds"
"""Reported as the longest of a request's sequences."""


def fastblt_usage(decoder: DecoderName, usages: list[Usage], first_byte_seconds: float | None = None) -> FastBltUsage:
    """The summed cost of several sequences, and the longest of their times."""
    figures: dict[str, Any] = {name: sum(getattr(usage, name) for usage in usages) for name in (*COUNTS, *BYTES)}
    figures |= {name: round(max(float(getattr(usage, name)) for usage in usages), 6) for name in SECONDS}
    calls, tokens = figures["global_calls"], sum(usage.completion_tokens for usage in usages)
    rows = Counter[str]()
    for usage in usages:
        rows.update(usage.rows)
    return FastBltUsage(
        decoder=decoder,
        rows=dict(rows),
        bytes_per_global_call=round(tokens / calls, 3) if calls else None,
        first_byte_seconds=first_byte_seconds,
        **figures,
    )
