"""Compares the decoders' speed with the one that their bytes predict: one request at a time, in turns with blt.

realisation: the speed-up over blt by the clock over the one that the bytes read predict. bandwidth use: bytes read per
second over the memory's, probed before every turn: the faster of a plain copy and a product with one row. arithmetic
use: multiply-adds per second over what all threads do in their nearest caches, probed likewise. Use of the nearer limit
is the larger of both. host cost: the share of the steps' time outside the four stages.
"""

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from engine.costs import bandwidth
from engine.memory.prefix import BLOCK
from kernels.dispatch import choose_kernels

from . import arithmetic, plot, report
from .generate import Reading, generate, prompts
from .paired import figures, shown
from .program import Content, Subject, Verdict, finish, parser, subject
from .variants import TRAINED, acceptance, ways_of

BOUND_BY_MEMORY = ("1b", "3b", "7b")
"""Shapes whose weights no cache holds; the aims are for them."""
PROMPT_BYTES = 2 * BLOCK
LEAST_REALISATION, LEAST_USE, LEAST_USE_GPU, MOST_HOST = 0.9, 0.8, 0.7, 0.05


def main(arguments: Sequence[str] | None = None) -> None:
    program = parser("realisation", __doc__, shape="1b", replays=True)
    program.add_argument("--bytes", type=int, default=96, help="generated per turn (%(default)s)")
    program.add_argument("--ways", nargs="+", choices=[way for way in TRAINED if way != "blt"], help="all by default")
    options = program.parse_args(arguments)
    with subject(options) as model:
        rows = measure(model, options.ways or list(TRAINED), options.bytes, options.turns)
    finish("realisation", model, {"rows": rows}, options, arguments)


def measure(model: Subject, wanted: Sequence[str], count: int, turns: int) -> list[dict[str, Any]]:
    # The prefix cache holds the prompt except for its last id, so that no turn computes it again.
    engine = model.engine(max_sequences=4, cache_bytes=1 << 30)
    prompt, wrap = prompts(1, PROMPT_BYTES), model.wrap(engine)
    device, dtype = engine.stepper.device, getattr(torch, engine.config.dtype)
    probe = partial(bandwidth.probe, choose_kernels(None, device), dtype, device)
    ways = ways_of(engine, drawn=model.drawn)
    runs = {way: partial(generate, engine, prompt, count, how, wrap) for way, how in ways.items()}
    for how in ways.values():
        generate(engine, prompt, min(count, 16), how, wrap)
    pairs: dict[str, list[tuple[Reading, Reading]]] = {way: [] for way in runs if way in wanted and way != "blt"}
    probes, speeds = [], []
    for way in tqdm(list(pairs) * turns, disable=None):
        probes.append(probe())
        speeds.append(arithmetic.probe(engine))
        pairs[way].append((runs["blt"](), runs[way]()))
    every = {"blt": [(blt, blt) for found in pairs.values() for blt, _ in found], **pairs}
    peak = statistics.median(max(found.values()) for found in probes)
    rates = {f"{kind}_gb_s": statistics.median(found[kind] for found in probes) / 1e9 for kind in probes[0]}
    speed = statistics.median(speeds)
    rates["limit_multiply_adds_g_s"] = speed / 1e9

    def multiplied(found: list[tuple[Reading, Reading]]) -> dict[str, float]:
        per_second = statistics.median(arithmetic.multiply_adds(engine, r) / r.seconds for _, r in found)
        return {"multiply_adds_g_s": per_second / 1e9, "arithmetic_use": per_second / speed}

    return [
        {"decoder": way, "acceptance": acceptance(way, replays=model.replays)}
        | figures(found, [peak] * len(found))
        | multiplied(found)
        | rates
        for way, found in every.items()
    ]


def render(content: Content) -> str:
    header = ["decoder", "acceptance", "speed-up over BLT", "predicted by bytes read", "realisation"]
    header += ["bandwidth use", "arithmetic use", "nearer limit", "host cost", "bytes a round"]
    return report.table(
        header,
        [
            [row["decoder"], row["acceptance"], _spread(row["over_blt"], row["range"]), f"{row['predicted']:.2f}"]
            + [_spread(row["realisation"], row["realisation_range"]), *_uses(row)]
            + [f"{row['host_cost']:.1%}", f"{row['bytes_per_round']:.2f}"]
            for row in content["rows"]
        ],
    )


def judge(content: Content) -> list[Verdict]:
    rows = content["rows"]
    label = " (replayed acceptance)" if content["subject"]["replays"] else ""
    worst = min((row for row in rows if row["decoder"] != "blt"), key=lambda row: row["realisation"])
    blt = next(row for row in rows if row["decoder"] == "blt")
    host = max(rows, key=lambda row: row["host_cost"])
    least = LEAST_USE_GPU if content["subject"]["device"] == "cuda" else LEAST_USE
    realised = f"{_spread(worst['realisation'], worst['realisation_range'])} for {worst['decoder']}, the least"
    used, outside = f"{blt['bandwidth_use']:.2f} for blt", f"{host['host_cost']:.1%} for {host['decoder']}, the most"
    verdicts = [
        Verdict(
            f"realisation{label}",
            f"at least {LEAST_REALISATION} for every decoder",
            realised,
            worst["realisation"] >= LEAST_REALISATION,
        ),
        Verdict("bandwidth use", f"at least {least}", used, blt["bandwidth_use"] >= least),
        Verdict("host cost", f"at most {MOST_HOST:.0%}", outside, host["host_cost"] <= MOST_HOST),
    ]
    if measured := [row for row in rows if "arithmetic_use" in row]:
        far = min(measured, key=_use)
        verdicts.append(
            Verdict(
                f"use of the nearer limit{label}",
                f"at least {least} for every decoder",
                f"{_use(far):.2f} for {far['decoder']}, the least",
                _use(far) >= least,
            )
        )
    if content["subject"]["model"].removesuffix(" shape") in BOUND_BY_MEMORY:
        return verdicts
    return [verdict._replace(aim="of the 1B shape alone", met=None) for verdict in verdicts]


def draw(content: Content, path: Path) -> None:
    rows = content["rows"]
    with plot.axes(path, "speed-up that the bytes read predict", "speed-up by the clock") as on:
        most = max(max(row["predicted"], row["over_blt"]) for row in rows) * 1.1
        on.plot([0, most], [0, most], marker="", linestyle="--", color=plot.INK, label="equal")
        for row in rows:
            low, high = row["range"]
            around = [[row["over_blt"] - low], [high - row["over_blt"]]]
            on.errorbar([row["predicted"]], [row["over_blt"]], yerr=around, fmt="o", capsize=3, label=row["decoder"])


def _use(row: Content) -> float:
    """Of the nearer limit."""
    return float(max(row["bandwidth_use"], row["arithmetic_use"]))


def _uses(row: Content) -> list[str]:
    """Of memory, of arithmetic, and the larger. Older recordings have the first alone."""
    memory = f"{row['bandwidth_use']:.2f}"
    if "arithmetic_use" not in row:
        return [memory, "", ""]
    nearer = "memory" if _use(row) == row["bandwidth_use"] else "arithmetic"
    return [memory, f"{row['arithmetic_use']:.2f}", f"{_use(row):.2f} of {nearer}"]


def _spread(median: float, limits: Sequence[float]) -> str:
    return shown({"median": median, "least": limits[0], "most": limits[1]})


if __name__ == "__main__":
    main()
