"""How well `fastblt size --simulate` tells a server's latencies: a real server under random loads, and its simulation.

The server's costs are measured, as the command does. Then the same requests come to the server and to the simulated
replica, at several shares of what it can serve for long.
"""

import asyncio
import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from engine.checkpoint import load
from engine.decoders import DECODERS
from engine.simulation.costs import ReplicaCosts
from engine.simulation.load import Arrival, Traffic, arrivals
from engine.simulation.replica import Served, serve
from server.capacity.curve import latency
from server.capacity.measure import Target, Texts, measure, stream
from server.size import Subject, text_of

from . import plot, report
from .program import Content, Verdict, finish, parser, subject
from .servers import server

AIM = 0.15
"""Most that a simulated figure may be off."""
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
                costs = measure(target, traffic, print)
                most = costs.most_requests_per_second(traffic.prompt_bytes, traffic.output_bytes)
                for share in options.shares:
                    asked = arrivals(traffic, share * most, round(options.seconds * share * most))
                    served = asyncio.run(_served(target, asked))
                    simulated = serve(load(model.path).config, costs, patch, asked)
                    rows.append(row(decoder, share, asked, served, simulated))
                    print({name: round(value, 3) for name, value in rows[-1].items() if isinstance(value, float)})
    figures = {"rows": rows, "traffic": traffic._asdict(), "threads": options.num_threads, "costs": _costs(costs)}
    finish("capacity", model, figures, options, arguments)


async def _served(target: Target, asked: Sequence[Arrival]) -> list[Served]:
    """By the server. Each request is sent at its time, whatever became of those before."""
    texts, began = Texts(), time.perf_counter()

    async def one(arrival: Arrival) -> Served:
        text = texts.prompt(arrival.prompt_bytes)
        await asyncio.sleep(max(began + arrival.at - time.perf_counter(), 0))
        found = await stream(target, text, arrival.output_bytes, began + arrival.at)
        return Served(found.first, found.times[-1][0], 0)

    return list(await asyncio.gather(*(one(arrival) for arrival in asked)))


def row(
    decoder: str, share: float, asked: Sequence[Arrival], served: Sequence[Served], simulated: Sequence[Served]
) -> dict[str, Any]:
    found: dict[str, Any] = {"decoder": decoder, "share": share, "requests": len(asked)}
    found["rate"] = len(asked) / asked[-1].at if asked[-1].at else 0.0
    for part in ("first_byte", "last_byte"):
        for name, all_of in (("real", served), ("simulated", simulated)):
            times = latency([getattr(one, part) for one in all_of], PERCENTILE)
            for figure, value in zip(FIGURES, (times.mean, times.median, times.high), strict=True):
                found[f"{part}_{figure}_{name}"] = value
    return found


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
            cells = [one["decoder"], f"{one['share']:.0%}", f"{one['rate']:.1f}", part.replace("_", " ")]
            for figure in FIGURES:
                real = one[f"{part}_{figure}_real"]
                cells += [f"{real:.3f}", f"{one[f'{part}_{figure}_simulated'] / real:.2f}"]
            rows.append(cells)
    traffic = content["traffic"]
    said = (
        f"Prompts of {traffic['prompt_bytes']:g} bytes and outputs of {traffic['output_bytes']:g} on average, with "
        f"standard deviations of {traffic['spread']:.0%}. Simulated: times the real figure. A load is a share of the "
        "most that the server can serve for long, as it was measured."
    )
    return f"{report.table([*header, 'simulated'], rows)}\n\n{said}"


def judge(content: Content) -> list[Verdict]:
    off = {part: ratios(content["rows"], part, "mean") for part in ("first_byte", "last_byte")}
    worst = max((max(abs(ratio - 1) for ratio in found), part) for part, found in off.items())
    last = mean(abs(ratio - 1) for ratio in off["last_byte"])
    said = f"off by {worst[0]:.0%} at most ({worst[1].replace('_', ' ')}); last byte {last:.0%} on average"
    return [Verdict("simulated mean latency", f"within {AIM:.0%}", said, worst[0] <= AIM)]


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
