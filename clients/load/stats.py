"""Throughput, times and goodput of a run."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from .percentiles import spread
from .record import Limits, Record, Run


def summary(run: Run, limits: Limits) -> dict[str, Any]:
    """Everything that a report tells of a run, in seconds and bytes. Interrupted requests count only as such."""
    records = [record for record in run.records if record.outcome != "interrupted"]
    return {
        "name": run.plan.name,
        "rate": run.plan.rate,
        "concurrency": run.plan.concurrency,
        "seconds": run.seconds,
        "interrupted": run.interrupted,
        **_figures(records, run.seconds, limits),
        "outcomes": {"done": 0, "refused": 0, "failed": 0} | Counter(record.outcome for record in run.records),
        "retries": sum(record.retries for record in run.records),
        "gap_seconds": run.gaps.spread(),
        "sent_late_seconds": spread(record.sent - record.planned for record in records),
        "finish_reasons": Counter(record.finish_reason for record in records if record.finish_reason),
        "errors": [
            {"kind": kind, "count": count, "example": run.examples[kind]}
            for kind, count in Counter(record.error for record in records if record.error).most_common()
        ],
        "by_decoder": {
            name: _figures([record for record in records if record.decoder == name], run.seconds, limits)
            for name in sorted({record.decoder for record in records if record.decoder})
        },
    }


def _figures(records: Sequence[Record], seconds: float, limits: Limits) -> dict[str, Any]:
    within = sum(map(limits.hold, records))
    num_bytes = sum(record.bytes for record in records)

    def per_second(count: float) -> float:
        return count / seconds if seconds else 0.0

    def of(value: Callable[[Record], float | None]) -> dict[str, float] | None:
        return spread(found for record in records if (found := value(record)) is not None)

    return {
        "requests": len(records),
        "requests_per_second": per_second(len(records)),
        "bytes": num_bytes,
        "bytes_per_second": per_second(num_bytes),
        "first_byte_seconds": of(lambda record: record.first_byte),
        "latency_seconds": of(lambda record: record.latency),
        "longest_gap_seconds": of(lambda record: record.longest_gap if record.chunks > 1 else None),
        "goodput": {
            "within": within,
            "share": within / len(records) if records else None,
            "per_second": per_second(within),
        },
    }
