"""A load's figures as one HTML file that loads nothing else."""

import json
from collections.abc import Callable, Iterator
from html import escape
from typing import Any

from .record import Record, Run
from .session import Result
from .show import COLUMNS, cells, headline, notes
from .svg import COLOURS, Series, chart

STYLE = """
:root { color-scheme: light dark; --ink: #222; --grid: #ddd; --back: #fff;
  --c0: #1f6fb4; --c1: #d9730d; --c2: #2f8f4e; --c3: #b3261e; --c4: #7b4fb5; --c5: #8a6d1b; }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --grid: #444; --back: #1b1b1b;
  --c0: #6cb2f0; --c1: #f2a154; --c2: #6fcf8e; --c3: #f28b82; --c4: #b99aea; --c5: #d8bd66; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--back);
  max-width: 1340px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: .6em 0; } td, th { padding: .1em .9em .1em 0; text-align: right; }
td:first-child, th:first-child { text-align: left; } pre { overflow: auto; } ul { padding-left: 1.2em; }
.charts { display: flex; flex-wrap: wrap; gap: 1em; } svg { width: 640px; max-width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--ink); } svg .title { font-size: 13px; font-weight: 600; }
svg .grid { stroke: var(--grid); stroke-width: 1; } svg polyline { fill: none; stroke-width: 2; }
"""
PERCENTILES = ("p50", "p95", "p99")
TIMES: dict[str, Callable[[Record], float | None]] = {
    "Time to the end": lambda record: record.latency,
    "Time to the first byte": lambda record: record.first_byte,
}
OUTCOMES = {"done": 2, "refused": 1, "failed": 3, "interrupted": 4}
"""Their colours."""


def page(result: Result) -> str:
    content = result.content
    model = content["workload"]["fields"]["model"]
    charts = [*_sweep(content["runs"]), *_distributions(result.runs)]
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Load on {escape(str(model))}</title><style>{STYLE}{_colours()}</style></head><body>",
        f"<h1>Load on {escape(str(model))}</h1><p>{escape(content['url'])}, {escape(content['started'])}</p>",
        f'<div class="charts">{"".join(charts)}</div>',
    ]
    for run, told in zip(result.runs, content["runs"], strict=True):
        parts += _section(run, told, content["limits_seconds"])
    parts.append(f"<h2>What was sent</h2><pre>{escape(json.dumps(content['workload'], indent=2))}</pre>")
    return "\n".join([*parts, "</body></html>\n"])


def _colours() -> str:
    return "".join(
        f"svg polyline.c{i} {{ stroke: var(--c{i}) }} svg circle.c{i}, svg rect.c{i} {{ fill: var(--c{i}) }}\n"
        for i in range(COLOURS)
    )


def _section(run: Run, told: dict[str, Any], limits: dict[str, float | None]) -> Iterator[str]:
    name, _, rest = headline(told).partition(": ")
    yield f"<h2>{escape(name)}</h2><p>{escape(rest)}</p>"
    head = "".join(f"<th>{column}</th>" for column in COLUMNS)
    yield f"<table><tr><th>ms</th>{head}</tr>"
    for label, numbers in cells(told):
        yield f"<tr><td>{label}</td>{''.join(f'<td>{number}</td>' for number in numbers)}</tr>"
    yield "</table><ul>"
    yield from (f"<li>{escape(note)}</li>" for note in notes(told, limits))
    yield "</ul>"
    yield _timeline(run)


def _sweep(runs: list[dict[str, Any]]) -> Iterator[str]:
    """Against the rate, or the requests at a time, if there are several."""
    key = "rate" if runs[0]["rate"] else "concurrency"
    if len(runs) < 2:
        return
    x_label = "requests a second" if key == "rate" else "requests at a time"
    for figure, title in {"latency_seconds": "Time to the end", "first_byte_seconds": "Time to the first byte"}.items():
        lines = [
            Series(column, [(run[key], run[figure][column]) for run in runs if run[figure]], i)
            for i, column in enumerate(PERCENTILES)
        ]
        yield chart(title, x_label, "seconds", lines)
    done = Series("requests", [(run[key], run["requests_per_second"]) for run in runs], 0)
    good = Series("done within the limits", [(run[key], run["goodput"]["per_second"]) for run in runs], 2)
    yield chart("Throughput and goodput", x_label, "a second", [done, good])
    bytes_per_second = Series("bytes", [(run[key], run["bytes_per_second"]) for run in runs], 0)
    yield chart("Bytes", x_label, "bytes a second", [bytes_per_second])


def _distributions(runs: list[Run]) -> Iterator[str]:
    """The share of requests that took at most so long."""
    for title, times in TIMES.items():
        lines = []
        for i, run in enumerate(runs[:COLOURS]):
            ordered = sorted(1000 * seconds for record in run.records if (seconds := times(record)) is not None)
            shares = [(value, 100 * (place + 1) / len(ordered)) for place, value in enumerate(ordered)]
            lines.append(Series(run.plan.name, shares, i))
        yield chart(title, "milliseconds", "% of requests", lines, log_x=True)


def _timeline(run: Run) -> str:
    def points(outcome: str) -> list[tuple[float, float]]:
        return sorted((r.planned, max(0.0, _taken(r))) for r in run.records if r.outcome == outcome)

    dots = [Series(outcome, points(outcome), colour, is_line=False) for outcome, colour in OUTCOMES.items()]
    title, x_label = "Requests by the time at which they were due", "seconds from the start"
    return chart(title, x_label, "seconds to the end", [series for series in dots if series.points])


def _taken(record: Record) -> float:
    return record.ended - record.planned
