"""The cost of HTTP: the same requests to the engine alone, in this process, and to a streaming server, in turns.

From the first request to the end of the last one, prompts included. Both engines have the same settings and are made
ready in the same way; by default a core is left to the server's HTTP process and the client.
"""

import asyncio
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import uvloop

from engine.decoders import DECODERS
from engine.engine import Engine
from engine.types import Delta, Failed, Request

from . import plot, report
from .generate import GREEDY, as_served, prompts
from .paired import in_turn, shown, spread
from .program import Content, Verdict, finish, parser, subject
from .servers import server, streams

LEAST = 0.95
PROMPT_BYTES = 100
WARM_UP_BYTES = 16


def main(arguments: Sequence[str] | None = None) -> None:
    program = parser("serving", __doc__)
    program.add_argument("--concurrency", type=int, nargs="+", default=[32, 64], help="streams at a time")
    program.add_argument("--bytes", type=int, default=256, help="per stream (%(default)s)")
    program.add_argument("--decoder", choices=[*DECODERS], default="blt", help="%(default)s: an event for every byte")
    options = program.parse_args(arguments)
    options.num_threads = options.num_threads or max(1, (os.cpu_count() or 1) - 1)
    with subject(options) as model:
        most = max(options.concurrency)
        settings: dict[str, Any] = {"max_sequences": most, "cache_bytes": 1 << 30, "prefix_cache": False}
        engine = model.engine(**settings)
        flags = [f"--max-sequences={most}", f"--cache-bytes={1 << 30}", "--no-prefix-cache", f"--dtype={model.dtype}"]
        flags += [f"--device={model.device}", f"--num-threads={options.num_threads}"]
        with as_served(engine), server(model.path, *flags) as address:
            rows = [measure(engine, address, count, options) for count in options.concurrency]
    figures = {"decoder": options.decoder, "bytes": options.bytes, "threads": torch.get_num_threads(), "rows": rows}
    finish("serving", model, figures, options, arguments)


def measure(engine: Engine, address: str, count: int, options: Any) -> dict[str, Any]:
    texts = prompts(count, PROMPT_BYTES)
    alone = partial(_alone, engine, texts, options.bytes, options.decoder)
    served = partial(_served, address, texts, options.bytes, options.decoder)
    _alone(engine, texts, WARM_UP_BYTES, options.decoder)
    _served(address, texts, WARM_UP_BYTES, options.decoder)
    pairs = in_turn(alone, served, options.turns)
    return {
        "concurrency": count,
        "of_engine": spread(http / engine for engine, http in pairs),
        "engine_bytes_per_second": spread(engine for engine, _ in pairs),
        "http_bytes_per_second": spread(http for _, http in pairs),
    }


def _alone(engine: Engine, texts: Sequence[list[int]], count: int, decoder: Any) -> float:
    """Bytes per second."""
    began, written = time.perf_counter(), 0
    for i, text in enumerate(texts):
        asked: dict[str, Any] = {"prompt_ids": text, "max_tokens": count, "sampling": GREEDY, "ignore_eos": True}
        engine.add(Request(id=str(i), decoder=decoder, **asked))
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, Failed):
                raise RuntimeError(event.message)
            written += len(event.ids) if isinstance(event, Delta) else 0
    return written / (time.perf_counter() - began)


def _served(address: str, texts: Sequence[list[int]], count: int, decoder: str) -> float:
    asked = {"max_tokens": count, "temperature": 0, "ignore_eos": True, "decoder": decoder}
    bodies = [{**asked, "prompt": text} for text in texts]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        began = time.perf_counter()
        found = runner.run(streams(address, bodies))
        took = time.perf_counter() - began
    if any(stream.tokens != count for stream in found):
        raise RuntimeError("a stream ended early")
    return sum(stream.tokens for stream in found) / took


def render(content: Content) -> str:
    header = ["streams at a time", "HTTP of the engine's bytes per second", "engine alone, bytes/s", "HTTP, bytes/s"]
    return report.table(
        header,
        [
            [str(row["concurrency"]), shown(row["of_engine"])]
            + [f"{row[f'{key}_bytes_per_second']['median']:,.0f}" for key in ("engine", "http")]
            for row in content["rows"]
        ],
    )


def judge(content: Content) -> list[Verdict]:
    return [
        Verdict(
            f"server cost, {row['concurrency']} streams of {content['decoder']}",
            f"at least {LEAST} of the engine's bytes/s",
            shown(row["of_engine"]),
            row["of_engine"]["median"] >= LEAST,
        )
        for row in content["rows"]
    ]


def draw(content: Content, path: Path) -> None:
    rows = content["rows"]
    with plot.axes(path, "streams at a time", "HTTP / engine alone") as on:
        places = range(len(rows))
        found = [row["of_engine"] for row in rows]
        around = [[f["median"] - f["least"] for f in found], [f["most"] - f["median"] for f in found]]
        on.bar(places, [f["median"] for f in found], 0.4, yerr=around, capsize=4, color=plot.COLOURS[0])
        on.axhline(LEAST, color=plot.INK, linestyle="--", label="aim")
        on.set_xticks(places, [str(row["concurrency"]) for row in rows])
        on.set_ylim(0, max(1.05, *(f["most"] * 1.05 for f in found)))


if __name__ == "__main__":
    main()
