"""The paper's 1B shape with random weights, one request at a time: is decoding bound by memory, and are the decoders as
fast as the bytes that they read predict? Fast-BLT's form in bfloat16; `forms` has the others.

bandwidth use: bytes read per second, as the engine counts them, over what a plain copy moves in the same process.
realisation: the speed-up over blt by the clock over the one that the counted bytes predict, in paired turns. host: the
share of a step in which the device is idle, from a few steps under the profiler.

Drafts of random weights are never right: all figures but blt's are with replayed acceptance (see `benchmarks.replay`).
Hash tables have a fiftieth of their rows, which does not change the bytes read, and patches have at most 8 bytes.
"""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.generate import generate, prompts
from benchmarks.models import Form, random_model, shaped
from benchmarks.paired import figures, in_turn
from benchmarks.replay import replayed
from benchmarks.variants import RANDOM, acceptance
from engine.costs import bandwidth
from engine.engine import Engine

from .piece import Piece
from .probe import copy_size
from .profiling import profile_steps
from .setting import CACHE_BYTES, CACHE_BYTES_1B, Setting


def measure(setting: Setting, piece: Piece) -> None:
    compare(setting, piece, "fast", (False,))


def compare(setting: Setting, piece: Piece, form: Form, weights: tuple[bool, ...]) -> None:
    """A row per decoder of a form, for bfloat16 (False) and float8 (True)."""
    peak = bandwidth.copy_rate(torch.device(setting.device), copy_size(setting))
    shape, cache_bytes = shape_of(setting)
    piece.put(copy_gb_s=peak / 1e9, shape=shape, hash_rows=shaped(shape, form).hashes.rows)
    began = time.perf_counter()
    model = random_model(setting.work, shape, form, device=setting.device)
    piece.put(**{f"seconds_to_make_{form}": time.perf_counter() - began})
    for float8 in weights:
        engine = setting.engine(model, dtype="bfloat16", float8=float8, max_sequences=4, cache_bytes=cache_bytes)
        for row in _rows(engine, form, peak, setting):
            piece.row("speed", {"form": form, "weights": "float8" if float8 else "bfloat16", **row})
        del engine


def shape_of(setting: Setting) -> tuple[str, int]:
    """The shape's name, and bytes for its caches."""
    return ("tiny", CACHE_BYTES) if setting.quick else ("1b", CACHE_BYTES_1B)


def _rows(engine: Engine, form: Form, peak: float, setting: Setting) -> Iterator[dict[str, Any]]:
    """The rows as they are measured: blt first, to which all are compared."""
    count, turns = (16, 1) if setting.quick else (320, 3)
    prompt, wrap, ways = prompts(1, 20 if setting.quick else 100), replayed(engine), RANDOM[form]
    runs = {way: partial(generate, engine, prompt, count, how, wrap) for way, how in ways.items()}
    for way, run in runs.items():
        began = time.perf_counter()
        run()
        warm_up = time.perf_counter() - began
        row = figures(in_turn(runs["blt"], run, turns), [peak] * turns)
        steps = profile_steps(engine, ways[way], wrap, setting)
        idle = max(0.0, steps["ms_per_step"] - steps["busy_ms_per_step"])
        yield {
            "decoder": way,
            "acceptance": acceptance(way, replays=True),
            **row,
            "host_gap": steps["host_gap"],
            "host_us_per_byte": 1e6 * idle / (row["ms_per_step"] * row["bytes_per_second"]),
            "warm_up_seconds": warm_up,
        }
