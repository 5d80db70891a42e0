"""Where a step's time goes: a few steps of every decoder under torch's profiler.

host gap: the share of a step's time in which the device runs nothing. The time is taken without the profiler, from the
same steps run before.
"""

import time
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.generate import GREEDY, Wrap, abandon, begin, prompts
from benchmarks.models import random_model
from benchmarks.replay import replayed
from benchmarks.report import NANO
from benchmarks.variants import RANDOM
from engine.engine import Engine
from engine.types import Delta, Request

from .piece import Piece
from .setting import CACHE_BYTES, CACHE_BYTES_1B, Setting

STEPS = 16
TOP = 12
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
WAYS = {name: how for name, how in RANDOM["fast"].items() if name != "blt-s k=16"}


def measure(setting: Setting, piece: Piece) -> None:
    shapes = {"nano": NANO}
    if not setting.quick:
        shapes["1b"] = random_model(setting.work, "1b", "fast", device=setting.device)
    for name, model in shapes.items():
        cache_bytes = CACHE_BYTES if name == "nano" else CACHE_BYTES_1B
        engine = setting.engine(model, dtype="bfloat16", max_sequences=4, cache_bytes=cache_bytes)
        for way, how in list(WAYS.items())[: 2 if setting.quick else None]:
            trace = setting.trace / f"{name}-{how['decoder']}.json" if setting.trace else None
            row = profile_steps(engine, how, None if name == "nano" else replayed(engine), setting, trace)
            piece.row("steps", {"model": name, "decoder": way, **row})
        del engine


def profile_steps(
    engine: Engine,
    how: dict[str, Any],
    wrap: Wrap | None,
    setting: Setting,
    trace: Path | None = None,
    number: int = 1,
) -> dict[str, Any]:
    """Time of a step of `number` requests, on the device and on the host. Raises RuntimeError if the profiler sees no
    kernel."""
    steps = 6 if setting.quick else STEPS
    # The same steps three times: the first compiles and records what they need.
    _window(engine, how, wrap, steps, number)
    seconds, committed = _window(engine, how, wrap, steps, number)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.on_gpu else [])]
    profiler = profile(activities=activities)
    _window(engine, how, wrap, steps, number, profiler)
    if trace:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
    events = profiler.events()
    taken = on_device(events) if setting.on_gpu else on_host(events)
    if not taken.spent:
        raise RuntimeError("the profiler saw no kernel; it may lack the right to look at the device")
    return {
        "steps": steps,
        "bytes_per_step": committed / steps,
        "ms_per_step": 1000 * seconds / steps,
        "busy_ms_per_step": taken.busy / 1000 / steps,
        "host_gap": max(0.0, 1 - taken.busy / 1e6 / seconds),
        "launches_per_step": {name: number / steps for name, number in taken.launches.items()},
        "top": [
            {"name": kernel, "us_per_step": spent / steps, "calls_per_step": taken.calls[kernel] / steps}
            for kernel, spent in taken.spent.most_common(TOP)
        ],
    }


def _window(
    engine: Engine,
    how: dict[str, Any],
    wrap: Wrap | None,
    steps: int,
    number: int = 1,
    profiler: profile | None = None,
) -> tuple[float, int]:
    """Seconds of the steps that follow the first bytes of `number` requests, and how many bytes they committed."""
    # No step commits more than 32 bytes of a request here.
    count = 32 * (steps + 1)
    requests = [
        Request(id=str(i), prompt_ids=prompt, max_tokens=count, sampling=GREEDY, ignore_eos=True, **how)
        for i, prompt in enumerate(prompts(number, 100))
    ]
    begin(engine, requests, wrap)
    committed = 0
    with profiler or nullcontext():
        began = time.perf_counter()
        for _ in range(steps):
            committed += sum(len(event.ids) for event in engine.step() if isinstance(event, Delta))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    abandon(engine, requests)
    return seconds, committed


@dataclass(slots=True)
class Taken:
    """Microseconds and calls by kernel, microseconds in which any ran, and their launches."""

    spent: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    busy: float = 0.0


def on_device(events: Iterable[Any]) -> Taken:
    """The kernels of a CUDA device."""
    taken = Taken()
    intervals: list[tuple[float, float]] = []
    for event in events:
        if event.device_type.name == "CUDA":
            if getattr(event, "is_user_annotation", False):
                continue
            intervals.append((event.time_range.start, event.time_range.end))
            taken.spent[event.name] += event.time_range.elapsed_us()
            taken.calls[event.name] += 1
        elif event.name in LAUNCHES or event.name.startswith("cudaMemcpy"):
            taken.launches[event.name] += 1
    taken.busy = covered(intervals)
    return taken


def on_host(events: Iterable[Any]) -> Taken:
    """Those of a CPU, which are torch's operations."""
    taken = Taken()
    for event in events:
        if event.name.startswith("aten::"):
            taken.spent[event.name] += event.self_cpu_time_total
            taken.calls[event.name] += 1
            taken.launches["operations"] += event.cpu_parent is None
    taken.busy = sum(taken.spent.values())
    return taken


def covered(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of some intervals."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
