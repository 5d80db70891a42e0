"""How well `fastblt size --simulate` tells a server's latencies: a real server under random loads, and its simulation.

The server's costs are measured before and after the loads of a decoder, as the command does, and averaged: a machine is
not equally fast for minutes. The same requests come to the server and to the simulated replica, at several shares of
what it can serve for long.
"""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import msgspec

from engine.checkpoint import load
from engine.config import ModelConfig
from engine.decoders import DECODERS
from engine.simulation.costs import PromptCost, ReplicaCosts, RoundCost
from engine.simulation.load import Arrival, Traffic, arrivals
from engine.simulation.replica import RequestLatency, serve
from server.capacity.curve import latency
from server.capacity.measure import Target, Texts, measure, stream
from server.size import Subject, text_of

from . import plot, report
from .program import Content, Verdict, finish, parser, subject
from .servers import server

MODERATE = 0.6
"""Loads up to this share hardly make requests wait for each other."""
AIM = 0.15
"""Most that a simulated figure may be off."""
BISECTIONS = 7
FIGURES = ("mean", "median", "p90")
PERCENTILE = 90.0


def main(arguments: Sequence[str] | None = None) -> None:
    program = parser("capacity", __doc__, in_turns=False)
    program.add_argument("--shares", type=float, nargs="+", default=[0.3, 0.6, 0.8], help="loads (%(default)s)")
    program.add_argument("--seconds", type=float, default=60.0, help="of each load (%(default)s)")
    program.add_argument("--decoders", choices=[*DECODERS], nargs="+", default=["blt"], help="(%(default)s)")
    program.add_argument("--prompt-bytes", type=float, default=400.0, help="mean (%(default)s)")
    program.add_argument("--output-bytes", type=float, default=200.0, help="mean (%(default)s)")
    program.add_argument("--spread", type=float, default=0.5, help="of lengths, in means (%(default)s)")
    options = program.parse_args(arguments)
    options.num_threads = options.num_threads or max(1, (os.cpu_count() or 1) - 1)
    traffic = Traffic(options.prompt_bytes, options.output_bytes, options.spread)
    with subject(options) as model:
        patch = text_of(Subject.read(model.path), 8, acceptance=1.0).patch
        flags = [f"--dtype={model.dtype}", f"--device={model.device}", f"--num-threads={options.num_threads}"]
        rows = []
        with server(model.path, *flags, "--max-queue", "4096") as address:
            for decoder in options.decoders:
                target = Target.of(address, decoder, None)
                before = measure(target, traffic, print)
                most = before.most_requests_per_second(traffic.prompt_bytes, traffic.output_bytes)
                loads = []
                for share in options.shares:
                    asked = arrivals(traffic, share * most, round(options.seconds * share * most))
                    loads.append((share, asked, asyncio.run(_served(target, asked))))
                costs, config = halfway(before, measure(target, traffic, print)), load(model.path).config
                for share, asked, served in loads:
                    rows.append(row(decoder, share, asked, served, serve(config, costs, patch, asked)))
                    rows[-1]["like"] = like_real(rows[-1], partial(_faster, config, costs, patch, asked))
                    print({name: round(value, 3) for name, value in rows[-1].items() if isinstance(value, float)})
    figures = {"rows": rows, "traffic": traffic._asdict(), "threads": options.num_threads, "costs": _costs(costs)}
    finish("capacity", model, figures, options, arguments)


def halfway(before: ReplicaCosts, after: ReplicaCosts) -> ReplicaCosts:
    """Of two measurements of one server."""
    rounds = [
        RoundCost(one.sequences, (one.seconds + other.seconds) / 2, (one.num_bytes + other.num_bytes) / 2)
        for one, other in zip(before.rounds, after.rounds, strict=True)
    ]
    prompts = [
        PromptCost(one.rows, (one.seconds + other.seconds) / 2)
        for one, other in zip(before.prompts, after.prompts, strict=True)
    ]
    request = (before.request_seconds + after.request_seconds) / 2
    return msgspec.structs.replace(before, rounds=rounds, prompts=prompts, request_seconds=request)


async def _served(target: Target, asked: Sequence[Arrival]) -> list[RequestLatency]:
    """By the server. Each request is sent at its time, whatever became of those before."""
    texts, began = Texts(), time.perf_counter()

    async def one(arrival: Arrival) -> RequestLatency:
        text = texts.prompt(arrival.prompt_bytes)
        await asyncio.sleep(max(began + arrival.at - time.perf_counter(), 0))
        found = await stream(target, text, arrival.output_bytes, began + arrival.at)
        return RequestLatency(found.first, found.times[-1][0], 0)

    return list(await asyncio.gather(*(one(arrival) for arrival in asked)))


def row(
    decoder: str,
    share: float,
    asked: Sequence[Arrival],
    served: Sequence[RequestLatency],
    simulated: Sequence[RequestLatency],
) -> dict[str, Any]:
    found: dict[str, Any] = {"decoder": decoder, "share": share, "requests": len(asked)}
    found["rate"] = len(asked) / asked[-1].at if asked[-1].at else 0.0
    for part in ("first_byte", "last_byte"):
        for name, all_of in (("real", served), ("simulated", simulated)):
            times = latency([getattr(one, part) for one in all_of], PERCENTILE)
            for figure, value in zip(FIGURES, (times.mean, times.median, times.high), strict=True):
                found[f"{part}_{figure}_{name}"] = value
    return found


def _faster(
    config: ModelConfig, costs: ReplicaCosts, patch: float, asked: Sequence[Arrival], times: float
) -> list[RequestLatency]:
    """The same requests at so many times the rate, simulated."""
    return serve(config, costs, patch, [one._replace(at=one.at / times) for one in asked])


def like_real(found: dict[str, Any], at: Callable[[float], list[RequestLatency]]) -> float:
    """Times the real load: where the simulation takes as long to the last byte as the server, on average."""
    low, high = 0.5, 1.5
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        takes = mean(one.last_byte for one in at(middle))
        low, high = (middle, high) if takes < found["last_byte_mean_real"] else (low, middle)
    return (low + high) / 2


def _costs(costs: ReplicaCosts) -> dict[str, Any]:
    """Those of the last decoder, in milliseconds."""
    steps = {str(one.sequences): [1000 * one.seconds, one.num_bytes] for one in costs.rounds}
    prompts = {str(one.rows): 1000 * one.seconds for one in costs.prompts}
    return {"steps": steps, "prompts": prompts, "request": 1000 * costs.request_seconds}


def ratios(rows: Sequence[dict[str, Any]], part: str, figure: str) -> list[float]:
    return [one[f"{part}_{figure}_simulated"] / one[f"{part}_{figure}_real"] for one in rows]


def render(content: Content) -> str:
    header = ["decoder", "load", "requests/s", "to the", "mean, s", "simulated", "median, s", "simulated", "p90, s"]
    rows = []
    for one in content["rows"]:
        for part in ("first_byte", "last_byte"):
            like = f"{one['like']:.2f}" if part == "last_byte" else ""
            cells = [one["decoder"], f"{one['share']:.0%}", f"{one['rate']:.1f}", part.replace("_", " ")]
            for figure in FIGURES:
                real = one[f"{part}_{figure}_real"]
                cells += [f"{real:.3f}", f"{one[f'{part}_{figure}_simulated'] / real:.2f}"]
            rows.append([*cells, like])
    traffic = content["traffic"]
    said = (
        f"Prompts of {traffic['prompt_bytes']:g} bytes and outputs of {traffic['output_bytes']:g} on average, with "
        f"standard deviations of {traffic['spread']:.0%}. Simulated: times the real figure. A load is a share of the "
        "most that the server can serve for long, as it was measured. In the last column: the load, times the real "
        "one, at which the simulation takes as long as the server. Near the limit latency grows fast with load, and "
        "replicas are counted by load."
    )
    return f"{report.table([*header, 'simulated', 'load'], rows)}\n\n{said}"


def judge(content: Content) -> list[Verdict]:
    """Latency where it hardly depends on the load, and the load where it does."""
    rows = content["rows"]
    easy, hard = ([one for one in rows if (one["share"] > MODERATE) == busy] for busy in (False, True))
    off = [abs(ratio - 1) for part in ("first_byte", "last_byte") for ratio in ratios(easy, part, "mean")]
    verdicts = []
    if off:
        found = f"off by {max(off):.0%} at most, {mean(off):.0%} on average"
        name = f"simulated mean latency, loads up to {MODERATE:.0%}"
        verdicts.append(Verdict(name, f"within {AIM:.0%}", found, max(off) <= AIM))
    if off := [abs(one["like"] - 1) for one in hard]:
        found = f"off by {max(off):.0%} at most, {mean(off):.0%} on average"
        name = "load for the same mean latency, loads above that"
        verdicts.append(Verdict(name, f"within {AIM:.0%}", found, max(off) <= AIM))
    return verdicts


def draw(content: Content, path: Path) -> None:
    with plot.axes(path, "requests a second", "mean latency, s") as on:
        for decoder in dict.fromkeys(one["decoder"] for one in content["rows"]):
            rows = [one for one in content["rows"] if one["decoder"] == decoder]
            rates = [one["rate"] for one in rows]
            for part in ("first_byte", "last_byte"):
                (line,) = on.plot(
                    rates, [one[f"{part}_mean_real"] for one in rows], label=f"{decoder}, {part}".replace("_", " ")
                )
                simulated = [one[f"{part}_mean_simulated"] for one in rows]
                on.plot(rates, simulated, color=line.get_color(), linestyle="--", marker="x", label="simulated")


if __name__ == "__main__":
    main()
