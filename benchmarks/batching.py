"""Measures batching: bytes per second of mixed decoders at rising concurrency.

Linear is the rate of the same requests if each were as fast as its decoder alone. It is out of reach once the machine
is bound by arithmetic and not by memory: when a plain matrix product with the rows of a mean pass takes noticeably
longer than one with the rows of a pass of one request.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from engine.costs import bandwidth
from engine.engine import Engine
from engine.memory.prefix import BLOCK
from engine.types import Delta, Request, SamplingParams
from kernels.dispatch import choose_kernels
from kernels.linear import Matrix

from . import plot, report
from .generate import Wrap, abandon, begin, prompts
from .paired import shown, spread
from .program import Content, Subject, Verdict, finish, parser, subject
from .variants import Ways, ways_of

LEAST = 0.8
WAYS = ("blt", "blt-s k=8", "blt-d B=8", "blt-dv B=8")
PRODUCT_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class Window:
    """Bytes generated in a time window with all requests running. rows: of a mean pass through a stage."""

    bytes_per_second: float
    rows: float


def main(arguments: Sequence[str] | None = None) -> None:
    program = parser("batching", __doc__, replays=True)
    program.add_argument("--concurrency", type=int, nargs="+", default=[4, 16, 64], help="concurrent requests")
    program.add_argument("--seconds", type=float, default=2.0, help="seconds per window (%(default)s)")
    options = program.parse_args(arguments)
    with subject(options) as model:
        rows = measure(model, options.concurrency, options.seconds, options.turns)
    finish("batching", model, {"rows": rows}, options, arguments)


def measure(model: Subject, concurrency: Sequence[int], seconds: float, turns: int) -> list[dict[str, Any]]:
    engine = model.engine(max_sequences=max(concurrency), max_step_rows=1024)
    wrap = model.wrap(engine)
    ways = {way: how for way, how in ways_of(engine, drawn=model.drawn).items() if way in WAYS}
    for count in (1, *concurrency):
        _window(engine, ways, count, 0.0, wrap)
    found: dict[int, list[tuple[float, float, float, float]]] = {count: [] for count in concurrency}
    with tqdm(total=turns * (len(ways) + len(concurrency)), disable=None) as bar:
        for _ in range(turns):
            alone = {}
            for way, how in ways.items():
                alone[way] = _window(engine, {way: how}, 1, seconds, wrap)
                bar.update()
            for count in concurrency:
                together = _window(engine, ways, count, seconds, wrap)
                linear = sum(alone[way].bytes_per_second for way in islice(cycle(ways), count))
                rows = statistics.mean(window.rows for window in alone.values())
                found[count].append((together.bytes_per_second, linear, together.rows, rows))
                bar.update()
    return [
        {
            "concurrency": count,
            "decoders": list(islice(ways, count)),
            "of_linear": spread(rate / linear for rate, linear, _, _ in of),
            "bytes_per_second": statistics.median(rate for rate, *_ in of),
            "over_one": spread(count * rate / linear for rate, linear, _, _ in of),
            "rows": statistics.median(rows for _, _, rows, _ in of),
            "product": statistics.median(_product(engine, rows) / _product(engine, few) for _, _, rows, few in of),
        }
        for count, of in found.items()
    ]


def _window(engine: Engine, ways: Ways, count: int, seconds: float, wrap: Wrap | None) -> Window:
    """Runs at least two steps. All requests have the same prompt, which is computed once, and different texts."""
    prompt = prompts(1, 2 * BLOCK)[0]
    length = engine.limits.max_length - len(prompt) - BLOCK
    asked: dict[str, Any] = {"prompt_ids": prompt, "max_tokens": length, "ignore_eos": True}
    requests = [
        Request(id=f"{way} {i}", sampling=SamplingParams(seed=i), **asked, **ways[way])
        for i, way in enumerate(islice(cycle(ways), count))
    ]
    begin(engine, requests, wrap)
    before, began, steps, written = engine.snapshot(), time.perf_counter(), 0, 0
    while steps < 2 or time.perf_counter() - began < seconds:
        written += sum(len(event.ids) for event in engine.step() if isinstance(event, Delta))
        steps += 1
    took, after = time.perf_counter() - began, engine.snapshot()
    abandon(engine, requests)
    if after.running < count or after.preemptions > before.preemptions:
        raise RuntimeError(f"{count} requests do not stay under way together; give a shorter window")
    passes = sum(after.calls.values()) - sum(before.calls.values())
    return Window(written / took, (sum(after.rows.values()) - sum(before.rows.values())) / passes)


def _product(engine: Engine, rows: float) -> float:
    """Seconds of a product of `rows` rows with the global transformer's largest matrix, streamed as there."""
    stack, device, dtype = engine.model_config.global_, engine.stepper.device, getattr(torch, engine.config.dtype)
    size = 2 * stack.ffn_dim * stack.dim * dtype.itemsize
    copies = max(1, min(stack.num_layers, PRODUCT_BYTES // size))
    x = torch.ones(max(1, round(rows)), stack.dim, dtype=dtype, device=device)
    kernels = choose_kernels(None, device)
    empty = torch.zeros(2 * stack.ffn_dim, stack.dim, dtype=dtype, device=device)
    matrices = [kernels.matrix(Matrix(empty.clone())) for _ in range(copies)]
    return 1 / bandwidth.stream_rate(lambda matrix: kernels.linear(x, matrix), matrices, device, times=1)


def render(content: Content) -> str:
    header = ["at a time", "times the bytes per second of one", "of linear", "rows of a mean pass"]
    header += ["a product with so many rows takes longer by"]
    return report.table(
        header,
        [
            [str(row["concurrency"]), shown(row["over_one"]), shown(row["of_linear"]), f"{row['rows']:.1f}"]
            + [f"{row['product']:.1f}x"]
            for row in content["rows"]
        ],
    )


def judge(content: Content) -> list[Verdict]:
    label = " (replayed acceptance)" if content["subject"]["replays"] else ""
    bound = [row for row in content["rows"] if row["product"] < 1 / LEAST]
    aim = f"at least {LEAST} of linear until compute-bound"
    if not bound:
        found = f"compute-bound with {content['rows'][0]['concurrency']} at a time already"
        return [Verdict(f"batching{label}", aim, found, None)]
    worst = min(bound, key=lambda row: row["of_linear"]["median"])
    found = f"{shown(worst['of_linear'])} of linear with {worst['concurrency']} at a time, the least"
    return [Verdict(f"batching{label}", aim, found, worst["of_linear"]["median"] >= LEAST)]


def draw(content: Content, path: Path) -> None:
    rows = content["rows"]
    counts = [1, *(row["concurrency"] for row in rows if row["concurrency"] > 1)]
    with plot.axes(path, "requests at a time", "times the bytes/s of one", ticks=counts) as on:
        on.set_yscale("log", base=2)
        on.plot(counts, counts, marker="", linestyle="--", color=plot.INK, label="linear")
        on.plot(counts, [1, *(row["over_one"]["median"] for row in rows if row["concurrency"] > 1)], label="measured")


if __name__ == "__main__":
    main()
