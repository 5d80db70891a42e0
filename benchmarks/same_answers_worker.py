"""Runs recorded requests through the engine of the checkout that it is started in, for `benchmarks.same_answers`.

A JSON list of `benchmarks.recorded.Run` comes on standard input. Standard output has a JSON line for each event, with
its run and its step, and after each run a line with what the engine counted. Times are left out of all of them.

It is started as a file, with the other checkout on the path, so it imports only what checkouts have in common.
"""

import json
import sys
from pathlib import Path
from typing import Any

import msgspec

import engine.engine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.types import Request

CACHE_SHIFTS = range(14, 40)
"""A run without `cache_bytes` gets the least power of two that holds one sequence: 1 << one of these."""
NO_ANSWERS = ("device_memory", "dropped_log_lines")
"""Fields of a snapshot that depend on the machine."""


def main() -> None:
    found = Path(engine.engine.__file__).resolve()
    if not found.is_relative_to(Path.cwd().resolve()):
        sys.exit(f"the engine is {found}, and not that of {Path.cwd()}")
    for run in json.load(sys.stdin):
        play(run)


def play(run: dict[str, Any]) -> None:
    """Adds and aborts at their steps, and steps until nothing is left."""
    engine = make_engine(run["config"])
    due: dict[int, list[Any]] = {}
    for step, kind, what in run["schedule"]:
        due.setdefault(step, []).append((kind, what))
    step = 0
    while due or engine.has_work:
        for kind, what in due.pop(step, ()):
            if kind == "add":
                engine.add(msgspec.convert(what, Request, str_keys=True))
            else:
                engine.abort(what)
        for event in engine.step() if engine.has_work else ():
            tell(run, step=step, event=timeless(msgspec.to_builtins(event)))
        step += 1
    tell(run, counted=timeless(msgspec.to_builtins(engine.snapshot())))


def make_engine(choices: dict[str, Any]) -> Engine:
    if "cache_bytes" in choices:
        return Engine(EngineConfig(**choices))
    for shift in CACHE_SHIFTS:
        try:
            return Engine(EngineConfig(cache_bytes=1 << shift, **choices))
        except ValueError as error:
            if "cache_bytes" not in str(error):
                raise
    raise ValueError(f"no cache of up to {1 << CACHE_SHIFTS[-1]} bytes holds one sequence")


def timeless(value: Any) -> Any:
    """Without seconds and what depends on the machine, at any depth."""
    if not isinstance(value, dict):
        return value
    kept = {str(key): timeless(entry) for key, entry in value.items()}
    return {key: entry for key, entry in kept.items() if not key.endswith("seconds") and key not in NO_ANSWERS}


def tell(run: dict[str, Any], **what: Any) -> None:
    print(json.dumps({"run": run["name"], **what}, sort_keys=True))


if __name__ == "__main__":
    main()
