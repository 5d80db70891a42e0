"""A load's figures as text."""

from collections.abc import Iterator
from typing import Any

TIMES = {
    "first_byte_seconds": "to the first byte",
    "gap_seconds": "between chunks",
    "longest_gap_seconds": "longest between chunks",
    "latency_seconds": "to the end",
    "sent_late_seconds": "sent late",
}
"""Rows of a run's table, in milliseconds."""
COLUMNS = ("mean", "p50", "p90", "p95", "p99", "max")
LIMITS = {"first_byte": "first byte", "gap": "between chunks", "latency": "end"}
LATE = 0.01
"""Seconds by which one request in a hundred may be sent late; beyond this the client may be the limit."""


def render(content: dict[str, Any]) -> str:
    return "\n\n".join("\n".join(_run(run, content["limits_seconds"])) for run in content["runs"])


def goodput(run: dict[str, Any], limits: dict[str, float | None]) -> str:
    """One line: how many requests were answered within the limits."""
    stated = ", ".join(f"{LIMITS[name]} {most:g} s" for name, most in limits.items() if most is not None)
    good = run["goodput"]
    share = "none" if good["share"] is None else f"{good['share']:.1%}"
    return (
        f"{share} of the requests done{f' within the limits ({stated})' if stated else ''}: {good['per_second']:.2f}/s"
    )


def cells(run: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Rows of times: their name, and milliseconds by COLUMNS."""
    for key, name in TIMES.items():
        if times := run.get(key):
            yield name, [f"{times[column] * 1000:,.1f}" for column in COLUMNS]


def headline(run: dict[str, Any]) -> str:
    outcomes = ", ".join(f"{count:,} {name}" for name, count in run["outcomes"].items() if count)
    rates = f"{run['requests_per_second']:.2f} requests/s, {run['bytes_per_second']:,.0f} bytes/s"
    return f"{run['name']}: {outcomes or 'no request'} in {run['seconds']:.1f} s; {rates}"


def notes(run: dict[str, Any], limits: dict[str, float | None]) -> Iterator[str]:
    """What there is to say beside the times."""
    yield goodput(run, limits)
    if run["finish_reasons"]:
        yield "finish reasons: " + ", ".join(f"{count:,} {name}" for name, count in run["finish_reasons"].items())
    if run["retries"]:
        yield f"{run['retries']:,} retries"
    for name, part in run["by_decoder"].items():
        times = part["latency_seconds"]
        ends = f", to the end {times['p50'] * 1000:,.1f} ms (p95 {times['p95'] * 1000:,.1f})" if times else ""
        yield f"{name}: {part['requests']:,} requests, {part['bytes_per_second']:,.0f} bytes/s{ends}"
    for error in run["errors"]:
        yield f"{error['count']:,} x {error['kind']}: {error['example']}"
    late = run["sent_late_seconds"]
    if run["rate"] and late and late["p99"] > LATE:
        yield "requests were sent late: --max-open was reached, or this machine cannot send faster"
    if run["interrupted"]:
        yield "interrupted: requests that had not ended are not counted"


def _run(run: dict[str, Any], limits: dict[str, float | None]) -> Iterator[str]:
    yield headline(run)
    yield f"{'ms':<24}" + "".join(f"{column:>10}" for column in COLUMNS)
    for name, numbers in cells(run):
        yield f"{name:<24}" + "".join(f"{number:>10}" for number in numbers)
    yield from notes(run, limits)
