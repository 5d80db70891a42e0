"""The paper's 1B shape with random weights, alone and with many requests at a time: is decoding bound by memory, are
the decoders as fast as the bytes that they read predict, and as fast as their launches and bytes do? Fast-BLT's form in
bfloat16; `forms` has the others.

bandwidth use: bytes read per second, as the engine counts them, over what a plain copy moves in the same process.
realisation: the speed-up over blt by the clock over the one that the counted bytes predict, in paired turns. host: the
share of a step in which the device is idle, from a few steps under the profiler. call_us: the time of a stage's call; a
global call has a part in what launches without a closed patch take. model: what `benchmarks.gpu_model` predicts for the
kernels as they are now and this card's copy.

Drafts of random weights are never right: all figures but blt's are with replayed acceptance (see `benchmarks.replay`).
Hash tables have a fiftieth of their rows, which does not change the bytes read, and patches have at most 8 bytes.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.generate import Reading, generate, prompts
from benchmarks.models import Form, random_model, shaped
from benchmarks.paired import figures, in_turn
from benchmarks.replay import replayed
from benchmarks.report import ROOT
from benchmarks.variants import RANDOM, acceptance
from engine.costs import bandwidth
from engine.engine import Engine

from .device import data_sheet_gb_s
from .piece import Piece
from .probe import copy_size
from .profiling import profile_steps
from .setting import CACHE_BYTES, CACHE_BYTES_1B, Setting

CONCURRENCY = (1, 16, 64)
CACHE_BYTES_64 = 12 << 30
AIM_US = {"patcher + encoder": 200, "global call": 870, "decoder pass": 185}
"""What calls of one sequence shall take at most, on an H200."""
AIM_COPY_GB_S = 4240
"""Its plain copy; a card that copies more slowly has as much more time."""


def measure(setting: Setting, piece: Piece) -> None:
    compare(setting, piece, "fast", (False,), (1, 2, 3) if setting.quick else CONCURRENCY)


def compare(
    setting: Setting, piece: Piece, form: Form, weights: tuple[bool, ...], concurrency: tuple[int, ...] = (1,)
) -> None:
    """A row per decoder of a form and number of requests at a time, for bfloat16 (False) and float8 (True)."""
    peak = bandwidth.copy_rate(torch.device(setting.device), copy_size(setting))
    shape, cache_bytes = shape_of(setting)
    if max(concurrency) > 4 and not setting.quick:
        cache_bytes = CACHE_BYTES_64
    piece.put(copy_gb_s=peak / 1e9, shape=shape, hash_rows=shaped(shape, form).hashes.rows)
    if setting.on_gpu:
        name = torch.cuda.get_device_name()
        piece.put(card=name, data_sheet_gb_s=data_sheet_gb_s(name))
    began = time.perf_counter()
    model = random_model(setting.work, shape, form, device=setting.device)
    piece.put(**{f"seconds_to_make_{form}": time.perf_counter() - began})
    if form == "fast":
        piece.put(model=predictions(shape, concurrency, peak / 1e9))
    slowdown = max(1.0, AIM_COPY_GB_S / (peak / 1e9))
    piece.put(aim_us={call: us * slowdown for call, us in AIM_US.items()} if setting.on_gpu else {})
    for float8 in weights:
        engine = setting.engine(
            model, dtype="bfloat16", float8=float8, max_sequences=max(4, *concurrency), cache_bytes=cache_bytes
        )
        for number in concurrency:
            for row in _rows(engine, form, peak, setting, number):
                piece.row("speed", {"form": form, "weights": "float8" if float8 else "bfloat16", **row})
        del engine


def shape_of(setting: Setting) -> tuple[str, int]:
    """The shape's name, and bytes for its caches."""
    return ("tiny", CACHE_BYTES) if setting.quick else ("1b", CACHE_BYTES_1B)


def predictions(shape: str, concurrency: tuple[int, ...], copy_gb_s: float) -> list[dict[str, Any]]:
    """Of `benchmarks.gpu_model`, in a process whose kernels are interpreted. Empty if it fails: what is measured counts
    without it."""
    command = [sys.executable, "-m", "benchmarks.gpu_model", "--model", shape, "--json"]
    command += ["--copy-gb-s", str(copy_gb_s), "--batch", *map(str, concurrency)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"no prediction: {done.stderr[-2000:]}", flush=True)
        return []
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def call_us(reading: Reading) -> dict[str, float]:
    """Microseconds of a call of each stage, patcher and encoder together; without stages that were not called."""
    each = {stage: 1e6 * reading.stage_seconds[stage] / calls for stage, calls in reading.calls.items() if calls}
    found = {"patcher + encoder": each.get("patcher", 0.0) + each.get("encoder", 0.0)}
    names = {"global": "global call", "decoder": "decoder pass"}
    return found | {call: each[stage] for stage, call in names.items() if stage in each}


def _rows(engine: Engine, form: Form, peak: float, setting: Setting, number: int) -> Iterator[dict[str, Any]]:
    """The rows as they are measured: blt first, to which all are compared."""
    count, turns = (16, 1) if setting.quick else (320, 3) if number == 1 else (128, 2)
    texts, wrap = prompts(number, 20 if setting.quick else 100), replayed(engine)
    ways = {way: how for way, how in RANDOM[form].items() if number == 1 or way != "blt-s k=16"}
    runs = {way: partial(generate, engine, texts, count, how, wrap) for way, how in ways.items()}
    for way, run in runs.items():
        began = time.perf_counter()
        run()
        warm_up = time.perf_counter() - began
        pairs = in_turn(runs["blt"], run, turns)
        row = {
            "concurrency": number,
            "decoder": way,
            "acceptance": acceptance(way, replays=True),
            **figures(pairs, [peak] * turns),
            "call_us": call_us(pairs[-1][1]),
            "warm_up_seconds": warm_up,
        }
        if number == 1:
            steps = profile_steps(engine, ways[way], wrap, setting)
            idle = max(0.0, steps["ms_per_step"] - steps["busy_ms_per_step"])
            row["host_gap"] = steps["host_gap"]
            row["host_us_per_byte"] = 1e6 * idle / (row["ms_per_step"] * row["bytes_per_second"])
        yield row
