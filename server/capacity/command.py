"""`fastblt size --simulate`: measures or reads what steps cost, and finds how many replicas a load needs."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import typer

from engine.config import ModelConfig
from engine.simulation import costs as files
from engine.simulation.costs import ReplicaCosts
from engine.simulation.load import Traffic

from ..calibration import check_plot
from ..progress import Progress
from .curve import LatencyTarget, Simulated, capacity, enough_requests, num_loads
from .measure import Target, measure
from .report import draw, render

DECODER = "blt"


@dataclass(frozen=True, slots=True)
class Asked:
    """rate: requests a second, for all replicas together. url: of a server to measure; costs: where the figures are
    kept. One of the two is needed. decoder: None for blt, or for that of the costs."""

    rate: float
    traffic: Traffic
    wanted: LatencyTarget
    url: str | None
    costs: Path | None
    api_key: str | None
    decoder: str | None


def run(config: ModelConfig, patch: float, asked: Asked, picture: Path | None, *, as_json: bool) -> str:
    """What is printed. patch: mean bytes. Raises ValueError, OSError."""
    if picture:
        check_plot(picture)
    costs = _costs(asked)
    percentile = asked.wanted.percentile
    enough = enough_requests(percentile, costs.max_sequences)
    simulated = Simulated(config, costs, patch, asked.traffic, percentile, enough)
    with Progress("simulating", num_loads(), "loads") as progress:
        found = capacity(simulated, asked.wanted, asked.rate, lambda done: progress.reach(done, num_loads()))
    if picture:
        draw(found, asked.wanted, f"{config.name}, {costs.decoder}", picture)
    if as_json:
        return json.dumps(found.to_json() | {"costs": msgspec.to_builtins(costs)}, indent=2)
    return render(found, costs, asked.traffic, asked.wanted)


def _costs(asked: Asked) -> ReplicaCosts:
    if asked.url:
        target = Target.of(asked.url, asked.decoder or DECODER, asked.api_key)
        found = measure(target, asked.traffic, _teller(target))
        if asked.costs:
            files.write(asked.costs, found)
        return found
    if not asked.costs:
        raise ValueError("--simulate needs --url, of a server that is measured, or --costs, of one that was")
    found = files.read(asked.costs)
    if asked.decoder not in (None, found.decoder):
        raise ValueError(f"--decoder: {asked.costs} has the costs of {found.decoder}, not of {asked.decoder}")
    return found


def _teller(target: Target) -> Callable[[str], None]:
    return lambda doing: typer.echo(f"measuring {target.url}: {doing}", err=True)
