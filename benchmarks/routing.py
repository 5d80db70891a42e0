"""Real replicas on one machine, through Ray: requests routed by what they cost, and by Ray's own rule, in turns.

Dialogues that go on, and prompts that share their beginnings, with several decoders, come at random, whatever became of
those before. Each turn starts both applications anew, one after the other, and sends both the same requests.

Every request ends at its `max_tokens`, which the rule by cost takes for the length of the output: it knows all lengths,
and real clients do not. What wrong guesses cost it is simulated by `benchmarks.fleet`.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from engine.checkpoint import load
from engine.costs.calibration import TEXT
from engine.types import MAX_DRAFT
from server.capacity.measure import Stream, Target, stream

from . import plot, report
from .fleet import Asked, requests
from .paired import shown, spread
from .program import Content, Subject, Verdict, finish, parser, subject
from .servers import ray_server

RULES = {
    "ray": ("benchmarks.ray_default_router", "Ray's own: the shorter queue of two replicas drawn at random"),
    "cost": ("deploy.ray_serve", "ours: where the request adds the least to the time that requests take"),
}
WARM_UP = 8
MOST = 1.0
LONGEST = 4000
"""Bytes of a prompt; the system prompts have up to 3,000."""


def main(arguments: Sequence[str] | None = None) -> None:
    program = parser("routing", __doc__)
    program.add_argument("--replicas", type=int, default=4, help="(%(default)s)")
    program.add_argument("--rate", type=float, default=3.0, help="requests a second, for all replicas (%(default)s)")
    program.add_argument("--seconds", type=float, default=40.0, help="of a turn (%(default)s)")
    options = program.parse_args(arguments)
    options.num_threads = options.num_threads or 1
    with subject(options) as model:
        model = replace(model, notes=[*model.notes, "through Ray"])
        flags = [f"--dtype={model.dtype}", f"--device={model.device}", f"--num-threads={options.num_threads}"]
        flags += [f"--replicas={options.replicas}", "--replica-cpus=0.01"]
        rows: list[dict[str, Any]] = []
        for turn in range(options.turns):
            asked = _held(model, options.rate, options.seconds, seed=turn)
            found = {}
            for rule in sorted(RULES, reverse=bool(turn % 2)):
                with ray_server(model.path, *flags, module=RULES[rule][0]) as address:
                    asyncio.run(_all(address, _held(model, 8.0, 4.0, seed=1000)[:WARM_UP]))
                    found[rule] = figures(asyncio.run(_all(address, asked)), asked)
            rows.append(found | {"requests": len(asked)})
            print({rule: {name: round(value, 3) for name, value in found[rule].items()} for rule in found}, flush=True)
    content = {"rows": rows, "replicas": options.replicas, "rate": options.rate, "threads": options.num_threads}
    finish("routing", model, content, options, arguments)


def _held(model: Subject, rate: float, seconds: float, seed: int) -> list[Asked]:
    """Those that the model has room for, the end of a last block included."""
    room = load(model.path).config.max_length - MAX_DRAFT
    asked = requests(rate, seconds, seed=seed)
    return [one for one in asked if len(one.prompt) <= LONGEST and len(one.prompt) + one.num_output <= room]


async def _all(address: str, asked: Sequence[Asked]) -> list[Stream]:
    began = time.perf_counter()
    targets = {decoder: Target.of(address, decoder, None) for decoder in {one.decoder for one in asked}}

    async def one(request: Asked) -> Stream:
        await asyncio.sleep(max(began + request.arrives - time.perf_counter(), 0))
        # The same beginnings as those of the bytes.
        text = "".join(TEXT[byte % len(TEXT)] for byte in request.prompt)
        return await stream(targets[request.decoder], text, request.num_output, began + request.arrives)

    return list(await asyncio.gather(*map(one, asked)))


def figures(found: Sequence[Stream], asked: Sequence[Asked]) -> dict[str, float]:
    """Seconds; cached: share of the prompts' bytes."""
    took = sorted(one.ended for one in found)
    return {
        "mean": mean(took),
        "p90": took[int(0.9 * len(took))],
        "first_byte": mean(one.first for one in found),
        "cached": sum(one.num_cached for one in found) / sum(len(one.prompt) for one in asked),
    }


def ratios(content: Content, figure: str) -> list[float]:
    return [row["cost"][figure] / row["ray"][figure] for row in content["rows"]]


def render(content: Content) -> str:
    header = ["rule", "mean, s", "p90, s", "first byte, s", "cached"]
    rows = []
    for rule in RULES:
        cells = [mean(row[rule][name] for row in content["rows"]) for name in ("mean", "p90", "first_byte")]
        cached = mean(row[rule]["cached"] for row in content["rows"])
        rows.append([rule, *(f"{value:.2f}" for value in cells), f"{cached:.0%}"])
    rows.append(["cost / ray", *(shown(spread(ratios(content, name))) for name in ("mean", "p90", "first_byte")), ""])
    rules = "\n".join(f"* {name}: {said}" for name, (_, said) in RULES.items())
    about = (
        f"{content['replicas']} replicas, {content['rate']:g} requests a second for all of them, "
        f"{len(content['rows'])} turns. All share this machine's cores with Ray and the client. The rule by cost knew "
        "the length of every output: each ended at its max_tokens."
    )
    return f"{report.table(header, rows)}\n\n{rules}\n\n{about}"


def judge(content: Content) -> list[Verdict]:
    found = spread(ratios(content, "mean"))
    said = f"{shown(found)} of the mean latency with Ray's own rule, lengths known"
    return [Verdict("routing by cost, real replicas", f"less than {MOST:g}", said, found["median"] < MOST)]


def draw(content: Content, path: Path) -> None:
    with plot.axes(path, "turn", "mean latency, s") as on:
        for rule in RULES:
            on.plot([row[rule]["mean"] for row in content["rows"]], label=rule)


if __name__ == "__main__":
    main()
