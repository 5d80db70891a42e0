"""Trains a Fast-BLT model on Python's standard library: `python -m training.train --out models/nano`.

First the patcher, then the threshold that gives patches of the requested length, then the model. The run has its own
folder with its state (saved every two minutes and when it is stopped) and its metrics, one JSON object per line.
"""

import argparse
import math
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.checkpoint import PRESETS
from engine.config import flag_help
from engine.step.transfer import to_device

from . import STARTED, model, objective
from .corpus import Corpus, corpora
from .device import chosen_device, description, synchronize
from .metrics import Metrics
from .passes import Pass, Passes
from .progress import Progress
from .state import MANIFEST, PATCHER, Phase, Settings, State, fraction

SAVE_SECONDS = 120.0
SPARE_SECONDS = 2.0
"""Seconds for the process to end after a stage's state is saved."""
MORE_TO_DO = 3
"""Exit code of a stage if the run is not finished."""

Step = Callable[[Tensor, torch.Generator], dict[str, Tensor]]


class Stopped(Exception):
    """The run was asked to stop; its state is saved."""


class StageOver(Exception):
    """The stage's time is up, and there is more to do; the state is saved."""


@dataclass(slots=True)
class _Run:
    """State that the phases of a run share within a process."""

    state: State
    corpus: Corpus
    folder: Path
    metrics: Metrics
    passes: Passes
    asked: Callable[[], bool]
    deadline: float | None
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=20))
    """Seconds of the last steps."""
    saved: float = field(default_factory=time.monotonic)
    save_seconds: float = 0.0

    def save(self) -> None:
        synchronize(self.state.device)
        began = time.monotonic()
        self.state.save(self.folder)
        self.saved = time.monotonic()
        self.save_seconds = max(self.save_seconds, self.saved - began)

    def is_due(self) -> bool:
        """Whether another step might leave too little time to save the state, should that take twice as long."""
        needed = max(self.seconds) + 2 * self.save_seconds + SPARE_SECONDS
        return self.deadline is not None and time.monotonic() + needed > self.deadline


def train(
    state: State, corpus: Corpus, folder: Path, passes: Passes | None = None, deadline: float | None = None
) -> None:
    """Runs the rest of both phases.

    Raises Stopped after SIGINT or SIGTERM, and StageOver in time before `deadline` (seconds of `time.monotonic`) but
    after at least one step; both with the state saved. Raises ValueError for another text than the run's.
    """
    if state.corpus not in (None, corpus.digest):
        raise ValueError(
            f"the run in {folder} began with another text (SHA-256 {state.corpus:.12}, this one {corpus.digest:.12}): "
            "give the --corpus that it began with (Python's library differs from version to version)"
        )
    state.corpus = corpus.digest
    folder.mkdir(parents=True, exist_ok=True)
    with _stop_requests() as asked, Metrics(folder, state.steps) as metrics:
        run = _Run(state, corpus, folder, metrics, passes or Passes(), asked, deadline)
        # Saves first: if compiling outlasts the stage, no step is lost.
        run.passes.before = run.save
        # Saves at once, to notice a folder that cannot be written before there is work to lose, and to time a save.
        run.save()
        if not state.settled:
            _phase(run, "patcher", _patcher_step(state, run.passes))
            _settle_patcher(state, corpus)
            run.save()
        _phase(run, "model", _model_step(state, run.passes))


def row_length(settings: Settings, done: float) -> int:
    """Bytes per row after the part `done` of the phase."""
    return next(length for start, length in reversed(settings.lengths) if done >= start)


def falling(settings: Settings, done: float) -> float:
    """What is left of the learning rates after the part `done` of the phase: all until `hold`, then a cosine to 0."""
    fallen = max(0.0, done - settings.hold) / (1 - settings.hold) if settings.hold < 1 else 0.0
    return 0.5 + 0.5 * math.cos(math.pi * fallen)


def _finished(state: State, phase: Phase) -> bool:
    return fraction(state, phase) >= 1.0


def _phase(run: _Run, name: str, step: Step) -> None:
    state, settings, phase = run.state, run.state.settings, run.state.phases[name]
    machine = description(state.device)
    with Progress(name, fraction(state, phase)) as progress:
        while not _finished(state, phase):
            began, chosen = time.monotonic(), run.passes.seconds
            done = fraction(state, phase)
            length = row_length(settings, done)
            # A step's draws depend on the seed, the phase and the step alone: a resumed run draws the same.
            seed = np.random.SeedSequence([settings.seed, name == "model", phase.step])
            rows = run.corpus.rows(np.random.default_rng(seed), max(1, settings.batch_bytes // length), length)
            draw = torch.Generator().manual_seed(int(seed.generate_state(1)[0]))
            figures = step(to_device(rows.numpy(), state.device), draw)
            rate = min(1.0, (phase.step + 1) / settings.warm_up) * falling(settings, done)
            for optimizer, base in zip(phase.optimizers, phase.rates, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = base * rate
                optimizer.step()
                optimizer.zero_grad()
            phase.step += 1
            phase.bytes += rows.shape[0] * length
            seconds = time.monotonic() - began - (run.passes.seconds - chosen)
            phase.seconds += seconds
            run.seconds.append(seconds)
            state.machines[machine] = state.machines.get(machine, 0.0) + seconds

            line = {"phase": name, "step": phase.step, "seconds": round(phase.seconds, 3), "bytes": phase.bytes}
            shown = run.metrics.add(line, figures)
            finished, due, asked = _finished(state, phase), run.is_due(), run.asked()
            if finished or due or asked:
                shown = run.metrics.flush() or shown
            progress.show(fraction(state, phase), shown, last=finished or due or asked)
            if finished or due or asked or time.monotonic() - run.saved > SAVE_SECONDS:
                run.save()
            if asked:
                raise Stopped
            if due and not (finished and name == "model"):
                raise StageOver


def _patcher_step(state: State, passes: Passes) -> Step:
    def step(row: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
        def loss(function: Pass) -> Tensor:
            found: Tensor = function(state.config, state.weights, row, state.settings.dtype)
            found.backward()
            return found

        found = loss(passes.choose(objective.patcher_loss, row.shape, _without_trace(loss, state)))
        return {"bits": found / math.log(2)}

    return step


def _model_step(state: State, passes: Passes) -> Step:
    settings = state.settings
    trained = [w for n, w in state.weights.items() if not n.startswith(PATCHER)]

    def step(row: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
        with torch.no_grad():
            patches = model.patch(state.config.patching, model.entropies(state.config, state.weights, row[:, :-1]))
        passes.vary(patches.starts)
        function: Pass = objective.next_byte_losses
        given: list[Any] = [row, patches]
        if fraction(state, state.phases["model"]) >= settings.blocks_from:
            # Without weight a single block, so that its loss is still logged.
            wanted = settings.blocks_per_kib if settings.mask_weight else 0
            per_text, share = max(1, wanted * (row.shape[1] - 1) // 1024), settings.full_share
            function = objective.losses
            given.append(objective.corrupt(state.config, row, patches, per_text, draw, full_share=share))

        def losses(function: Pass) -> objective.Losses:
            found: objective.Losses = function(state.config, state.weights, *given, settings.dtype)
            (found.clean + settings.mask_weight * found.mask).backward()
            return found

        found = losses(passes.choose(function, row.shape, _without_trace(losses, state)))
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        figures = {"bits": found.clean / math.log(2), "right": found.clean_right, "norm": norm}
        if len(given) > 2:
            figures |= {"mask": found.mask / math.log(2), "mask_right": found.mask_right}
        return figures

    return step


def _without_trace(losses: Callable[[Pass], Any], state: State) -> Callable[[Pass], None]:
    """Wraps `losses` so that no gradients remain."""

    def attempt(function: Pass) -> None:
        try:
            losses(function)
        finally:
            for weight in state.weights.values():
                weight.grad = None

    return attempt


def _settle_patcher(state: State, corpus: Corpus) -> None:
    """Rounds the patcher as it will be stored, so that patches do not change later; then sets the threshold."""
    with torch.no_grad():
        for name, weight in state.weights.items():
            if name.startswith(PATCHER):
                weight.copy_(weight.to(torch.bfloat16))
        rows = corpus.rows(np.random.default_rng(state.settings.seed), 64, 1024)
        entropy = model.entropies(state.config, state.weights, rows[:, :-1].to(state.device))
    low, high = 0.0, math.log(state.config.vocab_size)
    for _ in range(20):
        middle = (low + high) / 2
        patches = model.patch(replace(state.config.patching, threshold=middle), entropy)
        if float(patches.own.numel() / patches.counts.sum()) < state.settings.mean_patch:
            low = middle
        else:
            high = middle
    state.set_threshold(round(high, 4))
    state.settled = True
    print(f"threshold {high:.4f} nats", flush=True)


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
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


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def _minutes(text: str) -> float:
    if not 0 < (number := float(text)) < math.inf:
        raise ValueError(text)
    return number


_positive.__name__, _minutes.__name__ = "number above 0", "number of minutes above 0"  # for argparse's messages


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for the finished model (default models/nano; not with stages)")
    parser.add_argument("--run", type=Path, default=Path("runs/nano"), help="folder of the run (default runs/nano)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --run, with its own settings")
    choices = parser.add_argument_group("settings of a new run")
    bound = choices.add_mutually_exclusive_group()
    bound.add_argument("--minutes", type=_minutes, help="minutes of steps, over both phases (default 60)")
    bound.add_argument("--steps", type=_positive, help="steps of each phase, instead of minutes")
    trainable = [name for name, config in PRESETS.items() if config.block_size and config.patching.max_patch_length]
    choices.add_argument("--preset", choices=trainable, help="shape of the model (default nano)")
    choices.add_argument("--batch-bytes", type=_positive, help="bytes of text per step (default 6144)")
    choices.add_argument("--seed", type=int, help="seed of weights and draws (default 0)")
    choices.add_argument("--mask-weight", type=float, help="weight of the block term; 0 trains a plain BLT (ablation)")
    later = "share of the model's phase that learns next bytes only, before the block term joins (default 0)"
    choices.add_argument("--blocks-from", type=float, help=later)
    whole = "share of the blocks that are masked whole, as a draft in one step finds them (default 0)"
    choices.add_argument("--full-share", type=float, help=whole)
    choices.add_argument("--hold", type=float, help="share of a phase before the learning rates fall (default 0)")
    choices.add_argument(
        "--patcher-of", type=Path, help="use the patcher of the run in this folder instead of training one"
    )
    here = parser.add_argument_group("this process")
    here.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="device to train on (default cpu)")
    more = f"most minutes for this process; exit code {MORE_TO_DO} means that the run is not finished"
    here.add_argument("--stage-minutes", type=_minutes, help=more)
    text = "archive of python -m training.corpus (default: the library of this Python)"
    here.add_argument("--corpus", type=Path, help=text)
    compiled = "compile the passes; auto: on cuda, where it is measured to be faster (default auto)"
    here.add_argument("--compile", choices=["auto", "on", "off"], default="auto", help=compiled)
    here.add_argument("--threads", type=_positive, help=flag_help("num_threads", phrase=True))
    options = parser.parse_args(arguments)

    if options.out and options.stage_minutes:
        parser.error("--out is not for stages: they save a state, and python -m training.export makes a model from it")
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        device = chosen_device(options.device)
        state = _state(options, device)
        training, held_out = corpora(options.corpus)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{training.num_bytes / 1e6:.1f} MB to learn from, {held_out.num_bytes / 1e6:.1f} MB held out", flush=True)
    deadline = STARTED + 60 * options.stage_minutes if options.stage_minutes else None
    again = f"--resume --run {options.run}"
    try:
        train(state, training, options.run, Passes(options.compile, device, deadline), deadline)
    except Stopped:
        print(f"stopped; go on with {again}", file=sys.stderr)
        return 130
    except StageOver:
        print(f"the stage is over; go on with {again}", file=sys.stderr)
        return MORE_TO_DO
    except ValueError as error:
        parser.error(str(error))
    if options.stage_minutes:
        print(f"finished; python -m training.export --run {options.run} --out FOLDER makes the model", flush=True)
        return 0
    from .export import export  # draws a picture, which no stage needs

    out = options.out or Path("models/nano")
    result = export(state, training, held_out, options.run, out)
    print(f"{out}: {result.bits_per_byte:.3f} bits per byte held out", flush=True)
    return 0


def _state(options: argparse.Namespace, device: torch.device) -> State:
    """The run to continue, or a new one. Raises ValueError if the options contradict the run."""
    names = {field.name for field in fields(Settings)}
    given = {name: value for name, value in vars(options).items() if name in names and value is not None}
    if options.resume:
        state = State.load(options.run, device=device)
        for name, value in given.items():
            if value != (theirs := getattr(state.settings, name)):
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} {value}: the run in {options.run} has {theirs}, and keeps its settings")
        return state
    if (options.run / MANIFEST).exists():
        raise ValueError(f"{options.run} holds a run already: --resume goes on with it; to begin anew, delete it")
    if "steps" not in given:
        given.setdefault("minutes", 60.0)
    state = State.new(Settings(**given), device=device)
    if options.patcher_of:
        state.adopt_patcher(State.load(options.patcher_of))
    return state


if __name__ == "__main__":
    sys.exit(main())
