"""The gain of the prefix cache: requests that share a long prefix, with and without it, in turns.

All requests come at the same time, and every turn has a new prefix, which the cache does not know yet.
"""

import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from engine.engine import Engine
from engine.types import Delta, Failed, Request

from . import plot, report
from .generate import GREEDY, prompts
from .paired import in_turn, shown, spread
from .program import Content, Verdict, finish, parser, subject

OWN_BYTES = 32
"""Prompt bytes of each request after the shared prefix."""


def main(arguments: Sequence[str] | None = None) -> None:
    program = parser("prefix", __doc__)
    program.add_argument("--requests", type=int, default=64)
    program.add_argument("--prefix-bytes", type=int, default=4096)
    program.add_argument("--bytes", type=int, default=32, help="generated per request (%(default)s)")
    options = program.parse_args(arguments)
    with subject(options) as model:
        sizes = {"max_sequences": options.requests, "max_step_rows": 512, "cache_bytes": 2 << 30}
        engines = [model.engine(**sizes, prefix_cache=cached) for cached in (True, False)]
        figures = measure(engines, options)
    finish("prefix", model, figures, options, arguments)


def measure(engines: Sequence[Engine], options: Any) -> dict[str, Any]:
    warm_up, *prefixes = prompts(options.turns + 1, options.prefix_bytes)
    own = [text[1:] for text in prompts(options.requests, OWN_BYTES)]
    for engine in engines:
        _run(engine, [warm_up], 2)
    pairs = []
    for prefix in prefixes:
        texts = [[*prefix, *end] for end in own]
        cached, plain = (partial(_run, engine, texts, options.bytes) for engine in engines)
        pairs += in_turn(cached, plain, 1)
    if engines[0].config.dtype == "float32" and any(cached[2] != plain[2] for cached, plain in pairs):
        raise SystemExit("the texts differ: these times compare nothing")
    return {
        "requests": options.requests,
        "prefix_bytes": options.prefix_bytes,
        "bytes": options.bytes,
        "first_byte": spread(plain[0] / cached[0] for cached, plain in pairs),
        "total": spread(plain[1] / cached[1] for cached, plain in pairs),
        "first_byte_of_total": spread(cached[0] / cached[1] for cached, _ in pairs),
        "first_byte_of_total_without": spread(plain[0] / plain[1] for _, plain in pairs),
        "known": cached_share(engines[0]),
    }


def cached_share(engine: Engine) -> float:
    """The share of all prompts' ids found in the cache."""
    snapshot = engine.snapshot()
    return snapshot.cached_rows / (snapshot.cached_rows + snapshot.prompt_rows)


def _run(engine: Engine, texts: Sequence[list[int]], count: int) -> tuple[float, float, list[list[int]]]:
    """The median time to the first byte, the time to the last byte of all, in seconds, and the texts."""
    began = time.perf_counter()
    for i, text in enumerate(texts):
        asked: dict[str, Any] = {"prompt_ids": text, "max_tokens": count, "sampling": GREEDY, "ignore_eos": True}
        engine.add(Request(id=str(i), **asked))
    first: dict[str, float] = {}
    written: list[list[int]] = [[] for _ in texts]
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, Failed):
                raise RuntimeError(event.message)
            if isinstance(event, Delta):
                first.setdefault(event.id, time.perf_counter() - began)
                written[int(event.id)] += event.ids
    return statistics.median(first.values()), time.perf_counter() - began, written


def render(content: Content) -> str:
    return report.table(
        ["requests", "shared prefix", "first byte comes", "all are done", "of the prompts' ids known"],
        [
            [str(content["requests"]), f"{content['prefix_bytes']:,} bytes"]
            + [f"{shown(content[key], '.1f')} times as fast" for key in ("first_byte", "total")]
            + [f"{content['known']:.0%}"]
        ],
    )


def judge(content: Content) -> list[Verdict]:
    what = f"{content['requests']} requests with a prefix of {content['prefix_bytes']:,} bytes"
    found = f"first byte {shown(content['first_byte'], '.1f')} times as fast, all {shown(content['total'], '.1f')}"
    return [Verdict(f"prefix cache, {what}", "", found, None)]


def draw(content: Content, path: Path) -> None:
    with plot.axes(path, "time, without the cache = 1", "") as on:
        bars = {
            "all done, without": 1.0,
            "all done, with": 1 / content["total"]["median"],
            "first byte, without": content["first_byte_of_total_without"]["median"],
            "first byte, with": content["first_byte_of_total"]["median"] / content["total"]["median"],
        }
        on.barh(list(bars), list(bars.values()), 0.6, color=[plot.INK, plot.COLOURS[0]] * 2)


if __name__ == "__main__":
    main()
