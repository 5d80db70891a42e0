"""Compares the servers of two checkouts as a client sees them: the same streams from both, in turns.

Both run with this Python and its packages, on the same model with the same flags. Both need compiled kernels:
kernels/native/*.so is built at installation, and may be copied if its sources are the same.

A process may stay some per cent slower than another of the same program (by the place of its memory, or its cores), so
both servers are started several times.
"""

import asyncio
import os
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import uvloop

from . import plot, report
from .generate import prompts
from .paired import in_turn, shown, spread
from .program import Content, Verdict, finish, parser, subject
from .report import ROOT
from .servers import commit_of, ray_server, server, streams

LEAST = 0.95
CONFIDENCE = 0.95
PROMPT_BYTES = 100
WARM_UP_BYTES = 16
RESAMPLES = 10_000

Pair = tuple[dict[str, float], dict[str, float]]
"""Figures of the other server, and of this one."""


def main(arguments: Sequence[str] | None = None) -> None:
    program = parser("checkouts", __doc__)
    program.set_defaults(turns=10)
    program.add_argument(
        "--starts", type=int, default=4, help="starts of both servers, with --turns turns each (%(default)s)"
    )
    program.add_argument("--against", type=Path, required=True, help="folder of the other checkout")
    program.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32], help="streams at a time")
    program.add_argument("--decoders", nargs="+", default=["blt"], help="decoder of all streams (%(default)s)")
    program.add_argument("--ray", action="store_true", help="through Ray, with a replica of each")
    program.add_argument("--bytes", type=int, default=64, help="per stream (%(default)s)")
    options = program.parse_args(arguments)
    options.num_threads = options.num_threads or max(1, (os.cpu_count() or 1) - 1)
    with subject(options) as model:
        flags = [f"--max-sequences={max(options.concurrency)}", "--no-prefix-cache", f"--dtype={model.dtype}"]
        flags += [f"--device={model.device}", f"--num-threads={options.num_threads}"]
        pairs: dict[tuple[str, int], list[list[Pair]]] = {
            (decoder, count): [] for decoder in options.decoders for count in options.concurrency
        }
        if options.ray:
            model = replace(model, label=f"{model.label}-ray", notes=[*model.notes, "through Ray"])
        start = ray_server if options.ray else server
        roots = (ROOT, options.against.resolve())
        for number in range(options.starts):
            # A server may be some per cent faster for as long as it lives because it started second: they alternate.
            first = number % 2
            with (
                start(model.path, *flags, root=roots[first]) as one,
                start(model.path, *flags, root=roots[1 - first]) as two,
            ):
                this, other = (two, one) if first else (one, two)
                for how, starts in pairs.items():
                    starts.append(measure(this, other, *how, options))
    figures: dict[str, Any] = {
        "against": commit_of(options.against),
        "bytes": options.bytes,
        "turns": options.turns * options.starts,
    }
    figures["rows"] = [row(*how, starts) for how, starts in pairs.items()]
    finish("checkouts", model, figures, options, arguments)


def measure(this: str, other: str, decoder: str, count: int, options: Any) -> list[Pair]:
    texts = prompts(count, PROMPT_BYTES)
    for address in (this, other):
        _streamed(address, decoder, texts, WARM_UP_BYTES)
    before, now = (partial(_streamed, address, decoder, texts, options.bytes) for address in (other, this))
    return in_turn(before, now, options.turns)


def row(decoder: str, count: int, starts: Sequence[Sequence[Pair]]) -> dict[str, Any]:
    """starts: of both servers, with the turns of each. ratios: of the speeds, by start."""
    ratios = [[new["bytes_per_second"] / old["bytes_per_second"] for old, new in start] for start in starts]
    pairs = [*chain.from_iterable(starts)]
    first = [new["first"] / old["first"] for old, new in pairs]
    return {
        "decoder": decoder,
        "concurrency": count,
        "speed": spread(chain.from_iterable(ratios)) | {"lower": lower_bound(ratios)},
        "ratios": ratios,
        "first_byte": spread(first),
        "bytes_per_second": statistics.median(new["bytes_per_second"] for _, new in pairs),
        "before": statistics.median(old["bytes_per_second"] for old, _ in pairs),
    }


def lower_bound(starts: Sequence[Sequence[float]], confidence: float = CONFIDENCE) -> float:
    """One-sided lower bound of the median of all turns, by the bootstrap. starts: the turns of each.

    Turns of one start are alike, as a process may be slower for as long as it lives: starts are drawn first, and then
    turns of each of them. Drawn from all turns alike the bound would be too high.
    """
    draw = random.Random(0)

    def median() -> float:
        drawn = draw.choices(starts, k=len(starts))
        return statistics.median(chain.from_iterable(draw.choices(turns, k=len(turns)) for turns in drawn))

    return sorted(median() for _ in range(RESAMPLES))[int((1 - confidence) * RESAMPLES)]


def _streamed(address: str, decoder: str, texts: Sequence[list[int]], count: int) -> dict[str, float]:
    bodies: list[dict[str, Any]] = [
        {"prompt": text, "max_tokens": count, "temperature": 0, "ignore_eos": True, "decoder": decoder}
        for text in texts
    ]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        found = runner.run(streams(address, bodies))
    if any(stream.tokens != count for stream in found):
        raise RuntimeError("a stream ended early")
    took = max(stream.last for stream in found)
    return {
        "bytes_per_second": sum(stream.tokens for stream in found) / took,
        "first": statistics.median(stream.first for stream in found),
    }


def render(content: Content) -> str:
    header = [
        "decoder",
        "streams at a time",
        f"bytes/s over those of {content['against']}",
        "lower bound of the median",
    ]
    header += ["time to the first byte", "bytes/s before", "bytes/s"]
    return report.table(
        header,
        [
            [row["decoder"], str(row["concurrency"]), shown(row["speed"]), f"{row['speed']['lower']:.3f}"]
            + [shown(row["first_byte"]), f"{row['before']:,.0f}", f"{row['bytes_per_second']:,.0f}"]
            for row in content["rows"]
        ],
    )


def judge(content: Content) -> list[Verdict]:
    return [
        Verdict(
            f"speed of {row['decoder']} against {content['against']}, {row['concurrency']} streams",
            f"95 % lower bound of the median at least {LEAST}",
            f"{row['speed']['lower']:.3f} ({content['turns']} turns)",
            row["speed"]["lower"] >= LEAST,
        )
        for row in content["rows"]
    ]


def draw(content: Content, path: Path) -> None:
    rows = content["rows"]
    with plot.axes(path, "decoder and streams at a time", f"bytes/s over those of {content['against']}") as on:
        places = range(len(rows))
        found = [row["speed"] for row in rows]
        around = [[f["median"] - f["least"] for f in found], [f["most"] - f["median"] for f in found]]
        on.bar(places, [f["median"] for f in found], 0.4, yerr=around, capsize=4, color=plot.COLOURS[0])
        on.axhline(LEAST, color=plot.INK, linestyle="--", label="aim")
        on.set_xticks(places, [f"{row['decoder']}, {row['concurrency']}" for row in rows])


if __name__ == "__main__":
    main()
