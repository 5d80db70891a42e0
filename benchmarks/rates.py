"""Bytes per second of every decoder, alone and together, and their limits; in turns with blt alone.

A byte takes at least the time of its reads from memory and of its products on the processor; both are measured here, in
the same process. The rest is the host, attention's arithmetic, and reads and products that do not overlap.
"""

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from engine.costs import bandwidth
from engine.counts import STAGES
from engine.engine import Engine
from kernels.dispatch import choose_kernels

from . import arithmetic, plot, report
from .generate import Reading, generate, prompts
from .paired import shown, spread
from .program import Content, Subject, Verdict, finish, parser, subject
from .variants import ways_of

PROMPT_BYTES = 100
AIMS = {1: 1_000, 32: 10_000}
"""Aims for models/nano in bytes per second, by concurrency."""


def main(arguments: Sequence[str] | None = None) -> None:
    program = parser("rates", __doc__, replays=True)
    program.add_argument("--concurrency", type=int, nargs="+", default=list(AIMS), help="requests at a time")
    program.add_argument("--bytes", type=int, default=128, help="generated per request and turn (%(default)s)")
    options = program.parse_args(arguments)
    with subject(options) as model:
        figures = measure(model, options.concurrency, options.bytes, options.turns)
    finish("rates", model, figures, options, arguments)


def measure(model: Subject, concurrency: Sequence[int], count: int, turns: int) -> dict[str, Any]:
    engine = model.engine(max_sequences=max(concurrency))
    wrap, ways = model.wrap(engine), ways_of(engine, drawn=model.drawn)
    texts = {number: prompts(number, PROMPT_BYTES) for number in concurrency}
    runs = {
        (number, way): partial(generate, engine, texts[number], count, how, wrap)
        for number in concurrency
        for way, how in ways.items()
    }
    alone = partial(generate, engine, prompts(1, PROMPT_BYTES), count, ways["blt"], wrap)
    alone()
    found: dict[tuple[int, str], list[tuple[Reading, Reading]]] = {run: [] for run in runs}
    peaks, speeds = [], []
    for run in tqdm(list(runs) * turns, disable=None):
        peaks.append(max(_probe(engine).values()))
        speeds.append(arithmetic.probe(engine))
        found[run].append((alone(), runs[run]()))
    peak, speed = statistics.median(peaks), statistics.median(speeds)
    rows = [_row(engine, *run, pairs, peak, speed) for run, pairs in found.items()]
    return {"read_gb_s": peak / 1e9, "multiply_adds_g_s": speed / 1e9, "rows": rows}


def _row(
    engine: Engine, number: int, way: str, pairs: Sequence[tuple[Reading, Reading]], peak: float, speed: float
) -> dict[str, Any]:
    """ms: per byte, of each stage and of the host. least_ms: the memory's time for the bytes read, the processor's for
    the products."""
    readings = [reading for _, reading in pairs]
    last = readings[-1]
    seconds = {stage: statistics.median(r.stage_seconds[stage] / r.committed for r in readings) for stage in STAGES}
    total = statistics.median(r.seconds / r.committed for r in readings)
    multiplied = arithmetic.multiply_adds(engine, last) / last.committed
    return {
        "at_a_time": number,
        "decoder": way,
        "bytes_per_second": spread(r.bytes_per_second for r in readings),
        "over_blt_alone": spread(r.bytes_per_second / blt.bytes_per_second for blt, r in pairs),
        "ms": {stage: 1000 * s for stage, s in seconds.items()} | {"host": 1000 * (total - sum(seconds.values()))},
        "least_ms": {"memory": 1000 * last.read_per_byte / peak, "arithmetic": 1000 * multiplied / speed},
        "read_mb_per_byte": last.read_per_byte / 1e6,
        "multiply_adds_m_per_byte": multiplied / 1e6,
    }


def _probe(engine: Engine) -> dict[str, float]:
    device = engine.stepper.device
    return bandwidth.probe(choose_kernels(None, device), getattr(torch, engine.config.dtype), device)


def render(content: Content) -> str:
    header = ["at a time", "decoder", "bytes per second", "of blt alone", "ms per byte", "of it host"]
    header += ["memory alone, ms", "products alone, ms"]
    lines = []
    for row in content["rows"]:
        total, least = sum(row["ms"].values()), row["least_ms"]
        rate, ratio = shown(row["bytes_per_second"], ",.0f"), shown(row["over_blt_alone"])
        lines.append([str(row["at_a_time"]), row["decoder"], rate, ratio, f"{total:.2f}"])
        lines[-1] += [f"{row['ms']['host'] / total:.0%}", f"{least['memory']:.2f}", f"{least['arithmetic']:.2f}"]
    memory, products = content["read_gb_s"], content["multiply_adds_g_s"]
    said = f"The memory gave {memory:.1f} GB/s, products {products:.0f} G multiplications with addition per second."
    return f"{report.table(header, lines)}\n\n{said}"


def judge(content: Content) -> list[Verdict]:
    verdicts = []
    for number in dict.fromkeys(row["at_a_time"] for row in content["rows"]):
        rates = {
            row["decoder"]: row["bytes_per_second"]["median"] for row in content["rows"] if row["at_a_time"] == number
        }
        best = max(rates, key=lambda way: rates[way])
        aim = AIMS.get(number) if content["subject"]["model"] == "models/nano" else None
        found = ", ".join(f"{rates[way]:,.0f} with {way}" for way in dict.fromkeys([best, "blt"]))
        figure = f"bytes per second, {number} at a time"
        verdicts.append(Verdict(figure, f"at least {aim:,}" if aim else "", found, rates[best] >= aim if aim else None))
    return verdicts


def draw(content: Content, path: Path) -> None:
    rows = content["rows"]
    labels = [f"{row['decoder']}\n{row['at_a_time']}" for row in rows]
    with plot.axes(path, "decoder, requests at a time", "ms per byte") as on:
        bottom = [0.0] * len(rows)
        for part in (*STAGES, "host"):
            heights = [row["ms"][part] for row in rows]
            on.bar(labels, heights, bottom=bottom, label=part, width=0.6)
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
        least = [max(row["least_ms"].values()) for row in rows]
        on.plot(
            labels, least, linestyle="", marker="_", markersize=18, color=plot.INK, label="memory or products alone"
        )
        on.tick_params(axis="x", labelsize=7)


if __name__ == "__main__":
    main()
