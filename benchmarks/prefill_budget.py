"""A long prompt arrives while other requests stream: how long does it wait for its first byte, and how long do they
stall?

`max_step_rows` bounds the rows of a step, and so both times; the last row of the table is the engine's own choice
(`--max-stall-ms`), for prompts alone. Times are in units of an undisturbed step of the same streams in the same turn,
which makes a byte of each. The stall is the longest time between two bytes of any of them while the prompt is computed.
"""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.engine import Engine
from engine.types import Delta, Request

from . import plot, report
from .generate import GREEDY, abandon, begin, prompts, running_ahead
from .paired import shown, spread
from .program import Content, Verdict, finish, parser, subject

STREAM_BYTES = 64
"""Bytes of the streaming requests' prompts."""

NO_LIMIT_MS = 1e9


def main(arguments: Sequence[str] | None = None) -> None:
    program = parser("prefill_budget", __doc__)
    program.add_argument(
        "--budgets", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048], help="max_step_rows"
    )
    program.add_argument("--streams", type=int, default=16, help="requests that already stream (%(default)s)")
    program.add_argument("--prompt-bytes", type=int, default=4096, help="bytes of the long prompt (%(default)s)")
    program.add_argument("--steps", type=int, default=32, help="undisturbed steps to measure first (%(default)s)")
    options = program.parse_args(arguments)
    with subject(options) as model:
        rows = []
        for budget in tqdm([*options.budgets, None], disable=None):
            given = {"max_step_rows": budget, "max_stall_ms": NO_LIMIT_MS} if budget else {}
            sizes = {"max_sequences": options.streams + 1, "cache_bytes": 1 << 30}
            engine = model.engine(**sizes, **given, prefix_cache=False)
            engine.calibrate()
            _turn(engine, options)
            turns = [_turn(engine, options) for _ in range(options.turns)]
            said = {"budget": engine.info().prompt_rows, "chosen": budget is None}
            rows.append({**said, **{name: spread(turn[name] for turn in turns) for name in turns[0]}})
    figures = {"streams": options.streams, "prompt_bytes": options.prompt_bytes, "rows": rows}
    finish("prefill_budget", model, figures, options, arguments)


def _turn(engine: Engine, options: Any) -> dict[str, float]:
    length = engine.limits.max_length - STREAM_BYTES - 1
    asked: dict[str, Any] = {"sampling": GREEDY, "ignore_eos": True}
    running = [
        Request(id=str(i), prompt_ids=text, max_tokens=length, **asked)
        for i, text in enumerate(prompts(options.streams, STREAM_BYTES))
    ]
    begin(engine, running)
    unit = _unit(engine, options.steps)
    comes = Request(id="long", prompt_ids=prompts(1, options.prompt_bytes)[0], max_tokens=1, **asked)
    began = time.perf_counter()
    engine.add(comes)
    last = dict.fromkeys((request.id for request in running), began)
    stall, first = 0.0, None
    while first is None:
        events = [event for event in engine.step() if isinstance(event, Delta)]
        now = time.perf_counter()
        for event in events:
            if event.id == comes.id:
                first = now - began
            else:
                stall = max(stall, now - last[event.id])
                last[event.id] = now
    abandon(engine, running)
    alone = time.perf_counter()
    begin(engine, [comes])
    alone = time.perf_counter() - alone
    abandon(engine, [comes])
    return {"first_byte": first / unit, "alone": alone / unit, "stall": stall / unit, "step_seconds": unit}


def _unit(engine: Engine, steps: int) -> float:
    """Seconds of a step of one byte. A step that runs ahead has up to sixteen, but none does while a prompt is read."""
    with running_ahead(engine, "never"):
        return statistics.median(_timed(engine) for _ in range(steps))


def _timed(engine: Engine) -> float:
    began = time.perf_counter()
    engine.step()
    return time.perf_counter() - began


def render(content: Content) -> str:
    header = ["max_step_rows", "first byte of the prompt, steps", "without the streams", "longest stall, steps"]
    return report.table(
        header,
        [
            [
                f"{row['budget']:,}" + (", chosen" if row.get("chosen") else ""),
                *(shown(row[key], ".1f") for key in ("first_byte", "alone", "stall")),
            ]
            for row in content["rows"]
        ],
    )


def judge(content: Content) -> list[Verdict]:
    rows = [row for row in content["rows"] if not row.get("chosen")]
    least, most = (f"stall {shown(row['stall'], '.1f')} steps at {row['budget']:,}" for row in (rows[0], rows[-1]))
    what = f"{content['prompt_bytes']:,} bytes come to {content['streams']} streams"
    return [Verdict(f"prefill budget, {what}", "", f"{least}, {most}", None)]


def draw(content: Content, path: Path) -> None:
    rows = sorted(content["rows"], key=lambda row: row["budget"])
    budgets = [row["budget"] for row in rows]
    label = "undisturbed steps"
    with plot.axes(path, "max_step_rows", label, ticks=budgets) as on:
        for key, name in (("first_byte", "first byte of the new prompt"), ("stall", "longest stall of a stream")):
            on.plot(budgets, [row[key]["median"] for row in rows], label=name)
        on.set_yscale("log")


if __name__ == "__main__":
    main()
