"""The steps of a phase, for every kind of run: rows, gradients, rates, metrics, and the state saved in time."""

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from torch import Tensor

from engine.transfer import to_device

from .device import description, synchronize
from .metrics import Metrics
from .passes import Passes
from .progress import Progress
from .state import Phase

SAVE_SECONDS = 120.0
SAVE_SHARE = 10
"""A state that takes long to save is saved less often: after this many times what it took."""
SPARE_SECONDS = 2.0
"""Seconds for the process to end after a stage's state is saved."""

Step = Callable[[Tensor, torch.Generator], dict[str, Tensor]]


class Stopped(Exception):
    """The run was asked to stop; its state is saved."""


class StageOver(Exception):
    """The stage's time is up, and there is more to do; the state is saved."""


@dataclass(slots=True)
class Loop:
    """What the phases of a run share within a process. store: saves the run's state into `folder`. machines: seconds of
    steps, by device. deadline: when the process must have ended, in seconds of `time.monotonic`."""

    folder: Path
    store: Callable[[Path], None]
    metrics: Metrics
    passes: Passes
    device: torch.device
    machines: MutableMapping[str, float]
    asked: Callable[[], bool]
    deadline: float | None = None
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=20))
    """Seconds of the last steps."""
    saved: float = field(default_factory=time.monotonic)
    save_seconds: float = 0.0

    def save(self) -> None:
        """Raises Diverged and keeps the state before, if a step since has no finite loss or gradients."""
        self.metrics.flush()
        synchronize(self.device)
        began = time.monotonic()
        self.store(self.folder)
        self.metrics.saved = self.metrics.steps
        self.saved = time.monotonic()
        self.save_seconds = max(self.save_seconds, self.saved - began)

    def is_due(self) -> bool:
        """Whether another step might leave too little time to save the state, should that take twice as long."""
        needed = max(self.seconds) + 2 * self.save_seconds + SPARE_SECONDS
        return self.deadline is not None and time.monotonic() + needed > self.deadline


@dataclass(frozen=True, slots=True)
class Plan:
    """How a phase is run. seeds: of all its draws, together with the step. done: the part of the phase that is done.
    rows: draws a step's rows, (B, T + 1), after that part. last: no phase comes after it. hold: see `falling`."""

    name: str
    seeds: tuple[int, ...]
    warm_up: int
    done: Callable[[], float]
    rows: Callable[[np.random.Generator, float], Tensor]
    step: Step
    last: bool = False
    hold: float = 0.0


def falling(hold: float, done: float) -> float:
    """What is left of the learning rates after the part `done` of a phase: all until `hold`, then a cosine to 0."""
    fallen = max(0.0, done - hold) / (1 - hold) if hold < 1 else 0.0
    return 0.5 + 0.5 * math.cos(math.pi * fallen)


def run_phase(loop: Loop, phase: Phase, plan: Plan) -> None:
    """Runs the rest of a phase. Raises Stopped and StageOver, both with the state saved, and Diverged."""
    machine = description(loop.device)
    with Progress(plan.name, plan.done()) as progress:
        while plan.done() < 1:
            began, chosen = time.monotonic(), loop.passes.seconds
            done = plan.done()
            # A step's draws depend on the seed, the phase and the step alone: a resumed run draws the same.
            seed = np.random.SeedSequence([*plan.seeds, phase.step])
            rows = plan.rows(np.random.default_rng(seed), done)
            draw = torch.Generator().manual_seed(int(seed.generate_state(1)[0]))
            figures = plan.step(to_device(rows.numpy(), loop.device), draw)
            rate = min(1.0, (phase.step + 1) / plan.warm_up) * falling(plan.hold, done)
            for optimizer, base in zip(phase.optimizers, phase.rates, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = base * rate
                optimizer.step()
                optimizer.zero_grad()
            phase.step += 1
            phase.bytes += rows.shape[0] * (rows.shape[1] - 1)
            seconds = time.monotonic() - began - (loop.passes.seconds - chosen)
            phase.seconds += seconds
            loop.seconds.append(seconds)
            loop.machines[machine] = loop.machines.get(machine, 0.0) + seconds

            line = {"phase": plan.name, "step": phase.step, "seconds": round(phase.seconds, 3), "bytes": phase.bytes}
            shown = loop.metrics.add(line, figures)
            finished, due, asked = plan.done() >= 1, loop.is_due(), loop.asked()
            if finished or due or asked:
                shown = loop.metrics.flush() or shown
            progress.show(plan.done(), shown, last=finished or due or asked)
            pause = max(SAVE_SECONDS, SAVE_SHARE * loop.save_seconds)
            if finished or due or asked or time.monotonic() - loop.saved > pause:
                loop.save()
            if asked:
                raise Stopped
            if due and not (finished and plan.last):
                raise StageOver


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turns SIGINT and SIGTERM into a flag while the block runs."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
