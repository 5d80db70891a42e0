"""Trains a Fast-BLT model on Python's standard library: `python -m training.train --out models/nano`.

First the patcher, then the threshold that gives patches of the requested length, then the model. The run has its own
folder with its state (saved when it is stopped, and at least two minutes apart) and its metrics, one JSON object per
line.
"""

import argparse
import math
import shlex
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.checkpoint import PRESETS
from engine.config import flag_help

from . import STARTED, model, objective
from .continuing import continuing
from .corpus import Corpus, corpora
from .device import chosen_device
from .loop import Loop, Plan, StageOver, Step, Stopped, run_phase, stop_requests
from .metrics import Diverged, Metrics, copy_metrics
from .model import Clean
from .objective import Loss
from .passes import Pass, Passes
from .state import MANIFEST, PATCHER, Settings, State, fraction

MORE_TO_DO = 3
"""Exit code of a stage if the run is not finished."""


def train(
    state: State, corpus: Corpus, folder: Path, passes: Passes | None = None, deadline: float | None = None
) -> None:
    """Runs the rest of both phases.

    Raises Stopped after SIGINT or SIGTERM, and StageOver in time before `deadline` (seconds of `time.monotonic`) but
    after at least one step; both with the state saved. Raises ValueError for another text than the run's, and Diverged
    for a loss or gradients that are not finite.
    """
    if state.corpus not in (None, corpus.digest):
        raise ValueError(
            f"the run in {folder} began with another text (SHA-256 {state.corpus:.12}, this one {corpus.digest:.12}): "
            "give the --corpus that it began with (Python's library differs from version to version)"
        )
    state.corpus = corpus.digest
    folder.mkdir(parents=True, exist_ok=True)
    with stop_requests() as asked, Metrics(folder, state.steps) as metrics:
        passes = passes or Passes()
        loop = Loop(folder, state.save, metrics, passes, state.device, state.machines, asked, deadline)
        # Saves first: if compiling outlasts the stage, no step is lost.
        passes.before = loop.save
        # Saves at once, to notice a folder that cannot be written before there is work to lose, and to time a save.
        loop.save()
        if not state.settled:
            _phase(loop, state, corpus, "patcher", _patcher_step(state, passes))
            _settle_patcher(state, corpus)
            loop.save()
        _phase(loop, state, corpus, "model", _model_step(state, passes))


def row_length(settings: Settings, done: float) -> int:
    """Bytes per row after the part `done` of the phase."""
    return next(length for start, length in reversed(settings.lengths) if done >= start)


def block_weight(settings: Settings, done: float) -> float:
    """Weight of the block term after the part `done` of the model's phase."""
    after = done - settings.blocks_from
    rise = settings.block_warm_up
    return settings.mask_weight * (min(1.0, max(0.0, after) / rise) if rise else float(after >= 0))


def _phase(loop: Loop, state: State, corpus: Corpus, name: str, step: Step) -> None:
    settings, phase, is_model = state.settings, state.phases[name], name == "model"

    def rows(draw: np.random.Generator, done: float) -> Tensor:
        length = row_length(settings, done)
        return corpus.rows(draw, max(1, settings.batch_bytes // length), length)

    plan = Plan(
        name,
        (settings.seed, is_model),
        settings.warm_up,
        lambda: fraction(state, phase),
        rows,
        step,
        last=is_model,
        hold=settings.hold,
    )
    run_phase(loop, phase, plan)


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
        config, weights, dtype = state.config, state.weights, settings.dtype

        def of_text(function: Pass) -> tuple[Clean, Loss]:
            found: tuple[Clean, Loss] = function(config, weights, row, patches, dtype)
            return found

        trial = _without_trace(lambda function: of_text(function)[1].nats.backward(), state)
        clean, found = of_text(passes.choose(objective.next_bytes, row.shape, trial))
        total, figures = found.nats, {"bits": found.nats / math.log(2), "right": found.right}
        done = fraction(state, state.phases["model"])
        if config.mask_id is not None and done >= settings.blocks_from:
            # Without weight a single block, so that its loss is still logged.
            wanted = settings.blocks_per_kib if settings.mask_weight else 0
            per_text = max(1, wanted * (row.shape[1] - 1) // 1024)
            continued = continuing(config, weights, clean, dtype)
            shares = {"full_share": settings.full_share, "own_share": settings.own_share}
            corruption = objective.corrupt(config, row, patches, per_text, draw, **shares, continued=continued)

            def of_blocks(function: Pass, clean: Clean) -> Loss:
                passes.vary(clean.slots)
                found: Loss = function(config, weights, row, clean, corruption, dtype)
                return found

            trial = _without_trace(lambda function: of_blocks(function, clean.apart()).nats.backward(), state)
            found = of_blocks(passes.choose(objective.block_bytes, row.shape, trial), clean)
            total = total + block_weight(settings, done) * found.nats
            figures |= {"mask": found.nats / math.log(2), "mask_right": found.right}
        total.backward()
        return figures | {"norm": torch.nn.utils.clip_grad_norm_(trained, 1.0)}

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
    later = "share of the model's phase that learns next bytes only, before the block term joins (default 0.6)"
    choices.add_argument("--blocks-from", type=float, help=later)
    rise = "share of the model's phase in which the block term then rises to its weight (default 0.1)"
    choices.add_argument("--block-warm-up", type=float, help=rise)
    blocks = "blocks drawn per 1024 bytes of text (default 32)"
    choices.add_argument("--blocks-per-kib", type=_positive, help=blocks)
    whole = "share of the blocks that are masked whole, as a draft in one step finds them (default 0.5)"
    choices.add_argument("--full-share", type=float, help=whole)
    own = "share of the texts whose blocks hold the model's own continuations, from anywhere (default 0.5)"
    choices.add_argument("--own-share", type=float, help=own)
    choices.add_argument("--hold", type=float, help="share of a phase before the learning rates fall (default 0.6)")
    choices.add_argument(
        "--patcher-of", type=Path, help="use the patcher of the run in this folder instead of training one"
    )
    finished = "begin from the weights and the patcher of the finished model in this folder, of the same shape"
    choices.add_argument("--model-of", dest="finished", metavar="FOLDER", type=Path, help=finished)
    branch = "begin from the state of the run in this folder, with its settings but for those given here"
    choices.add_argument("--branch-of", type=Path, help=branch)
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
    again = shlex.join(["--resume", "--run", str(options.run), *_given_again(parser, options)])
    try:
        train(state, training, options.run, Passes(options.compile, device, deadline), deadline)
    except Stopped:
        print(f"stopped; go on with {again}", file=sys.stderr)
        return 130
    except StageOver:
        print(f"the stage is over; go on with {again}", file=sys.stderr)
        return MORE_TO_DO
    except Diverged as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        kept = f"; the last saved state is complete: go on with {again}" if (options.run / MANIFEST).exists() else ""
        print(f"{parser.prog}: {error}{kept}", file=sys.stderr)
        return 1
    except ValueError as error:
        parser.error(str(error))
    if options.stage_minutes:
        print(f"finished; python -m training.export --run {options.run} --out FOLDER makes the model", flush=True)
        return 0
    from .export import export  # draws a picture, which no stage needs

    out = options.out or Path("models/nano")
    try:
        result = export(state, training, held_out, options.run, out)
    except OSError as error:
        print(f"{parser.prog}: {error}; the run is finished: write its model with {again}", file=sys.stderr)
        return 1
    print(f"{out}: {result.bits_per_byte:.3f} bits per byte held out", flush=True)
    return 0


def _given_again(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[str]:
    """The flags of this process that a resumed run needs again: those that differ from the defaults and that no run
    keeps."""
    found = []
    for name in ("out", "device", "stage_minutes", "corpus", "compile", "threads"):
        if (value := getattr(options, name)) != parser.get_default(name):
            found += ["--" + name.replace("_", "-"), str(value)]
    return found


def _state(options: argparse.Namespace, device: torch.device) -> State:
    """The run to continue, or a new one. Raises ValueError if the options contradict the run."""
    names = {field.name for field in fields(Settings)}
    given = {name: value for name, value in vars(options).items() if name in names and value is not None}
    if options.resume:
        begins = {"--branch-of": options.branch_of, "--patcher-of": options.patcher_of, "--model-of": options.finished}
        if others := " and ".join(flag for flag, value in begins.items() if value):
            raise ValueError(f"--resume goes on with the run in {options.run} as it is: leave out {others}")
        state = State.load(options.run, device=device)
        for name, value in given.items():
            if value != (theirs := getattr(state.settings, name)):
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} {value}: the run in {options.run} has {theirs}, and keeps its settings")
        return state
    if (options.run / MANIFEST).exists():
        raise ValueError(f"{options.run} holds a run already: --resume goes on with it; to begin anew, delete it")
    if options.branch_of:
        state = State.load(options.branch_of, device=device)
        if options.preset or options.patcher_of or options.finished:
            others = "--preset, --patcher-of and --model-of"
            raise ValueError(f"--branch-of keeps the shape, patcher and weights of its run: leave out {others}")
        bound = {"minutes": None, "steps": None} if {"minutes", "steps"} & given.keys() else {}
        state.settings = replace(state.settings, **bound | given)
        copy_metrics(options.branch_of, options.run)
        return state
    if "steps" not in given:
        given.setdefault("minutes", 60.0)
    state = State.new(Settings(**given), device=device)
    if options.finished:
        if options.patcher_of:
            raise ValueError("--model-of brings its own patcher: leave out --patcher-of")
        state.adopt_model(options.finished)
    elif options.patcher_of:
        state.adopt_patcher(State.load(options.patcher_of))
    return state


if __name__ == "__main__":
    sys.exit(main())
