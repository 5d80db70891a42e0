"""Trains a Fast-BLT model on Python's standard library: `python -m training.train --out models/nano`.

First the patcher, then the threshold that gives patches of the wanted length, then the model. The run lives in a
folder of its own: its state (saved every two minutes and when it is stopped), its metrics, one JSON object a line.
"""

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import model, objective
from .corpus import Corpus, standard_library
from .export import export
from .state import PATCHER, Phase, Settings, State

SAVE_SECONDS = 120.0
LOG_SECONDS = 15.0

Step = Callable[[Tensor, torch.Generator], dict[str, Tensor | float]]


class Stopped(Exception):
    """The run was asked to stop; its state is saved."""


def train(state: State, corpus: Corpus, run: Path) -> None:
    """Runs what is left of both phases. Raises Stopped after SIGINT or SIGTERM, with the state saved."""
    with _stop_requests() as stopping:
        patcher, main = state.phases["patcher"], state.phases["model"]
        if not state.settled:
            _run(state, patcher, _patcher_step(state), corpus, run, stopping)
            _settle_patcher(state, corpus)
        _run(state, main, _model_step(state), corpus, run, stopping)


def fraction(state: State, phase: Phase) -> float:
    """How much of a phase is done, 0..1: of its steps, or of its share of the minutes."""
    settings = state.settings
    if settings.steps is not None:
        return min(1.0, phase.step / settings.steps)
    assert settings.minutes is not None
    is_patcher = phase is state.phases["patcher"]
    share = settings.patcher_share if is_patcher else 1 - settings.patcher_share
    return min(1.0, phase.seconds / (60 * settings.minutes * share))


def row_length(settings: Settings, done: float) -> int:
    """Bytes per row when a part `done` of the phase is behind."""
    return next(length for start, length in reversed(settings.lengths) if done >= start)


def _finished(state: State, phase: Phase) -> bool:
    return fraction(state, phase) >= 1.0


def _run(state: State, phase: Phase, step: Step, corpus: Corpus, run: Path, stopping: Callable[[], bool]) -> None:
    name = next(n for n, p in state.phases.items() if p is phase)
    settings = state.settings
    saved = logged = time.monotonic()
    on_terminal = sys.stderr.isatty()
    run.mkdir(parents=True, exist_ok=True)
    with tqdm(total=1.0, initial=fraction(state, phase), desc=name, disable=not on_terminal,
              bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}") as bar, \
         (run / "metrics.jsonl").open("a") as metrics:  # fmt: skip
        while not _finished(state, phase):
            began, done = time.monotonic(), fraction(state, phase)
            length = row_length(settings, done)
            # A step's draws depend on the seed, the phase and the step alone: a resumed run draws the same.
            seed = np.random.SeedSequence([settings.seed, name == "model", phase.step])
            row = corpus.rows(np.random.default_rng(seed), max(1, settings.batch_bytes // length), length)
            rate = min(1.0, (phase.step + 1) / settings.warm_up) * (0.5 + 0.5 * math.cos(math.pi * done))
            found = step(row, torch.Generator().manual_seed(int(seed.generate_state(1)[0])))
            for optimizer, base in zip(phase.optimizers, phase.rates, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = base * rate
                optimizer.step()
                optimizer.zero_grad()
            phase.step += 1
            phase.bytes += row.shape[0] * length
            now = time.monotonic()
            phase.seconds += now - began

            figures = {key: float(value) for key, value in found.items()}
            line = {"phase": name, "step": phase.step, "seconds": phase.seconds, "bytes": phase.bytes, **figures}
            metrics.write(json.dumps(line) + "\n")
            metrics.flush()
            bar.set_postfix_str(
                f", {figures['bits']:.3f} bits/byte, {row.shape[0] * length / (now - began) / 1e3:.1f} kB/s"
            )
            bar.update(min(1.0, fraction(state, phase)) - bar.n)
            if not on_terminal and (now - logged > LOG_SECONDS or _finished(state, phase)):
                logged = now
                shown = " ".join(f"{k}={v:.3f}" for k, v in figures.items())
                print(f"{name} {fraction(state, phase):6.1%} step={phase.step} MB={phase.bytes / 1e6:.2f} "
                      f"kB/s={phase.bytes / phase.seconds / 1e3:.2f} {shown}", flush=True)  # fmt: skip
            if stopping() or now - saved > SAVE_SECONDS or _finished(state, phase):
                saved = now
                state.save(run / "state.pt")
            if stopping():
                raise Stopped


def _patcher_step(state: State) -> Step:
    def step(row: Tensor, draw: torch.Generator) -> dict[str, Tensor | float]:
        loss = objective.patcher_loss(state.config, state.weights, row, state.settings.dtype)
        loss.backward()
        return {"bits": loss.detach() / math.log(2)}

    return step


def _model_step(state: State) -> Step:
    settings = state.settings
    trained = [w for n, w in state.weights.items() if not n.startswith(PATCHER)]

    def step(row: Tensor, draw: torch.Generator) -> dict[str, Tensor | float]:
        with torch.no_grad():
            patches = model.patch(state.config.patching, model.entropies(state.config, state.weights, row[:, :-1]))
        # Without weight a single block, so that its loss is still seen.
        wanted = settings.blocks_per_kib if settings.mask_weight else 0
        per_text = max(1, wanted * (row.shape[1] - 1) // 1024)
        corruption = objective.corrupt(state.config, row, patches, per_text, draw)
        losses = objective.losses(state.config, state.weights, row, patches, corruption, settings.dtype)
        (losses.clean + settings.mask_weight * losses.mask).backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        return {
            "bits": losses.clean.detach() / math.log(2),
            "mask": losses.mask.detach() / math.log(2),
            "right": losses.clean_right,
            "mask_right": losses.mask_right,
            "norm": norm,
        }

    return step


def _settle_patcher(state: State, corpus: Corpus) -> None:
    """Rounds the patcher as it will be stored, so that patches stay what they are; then sets the threshold."""
    with torch.no_grad():
        for name, weight in state.weights.items():
            if name.startswith(PATCHER):
                weight.copy_(weight.to(torch.bfloat16))
        ids = corpus.rows(np.random.default_rng(state.settings.seed), 64, 1024)[:, :-1]
        entropy = model.entropies(state.config, state.weights, ids)
    low, high = 0.0, math.log(state.config.vocab_size)
    for _ in range(20):
        middle = (low + high) / 2
        patches = model.patch(replace(state.config.patching, threshold=middle), entropy)
        if float(patches.holds.sum() / patches.counts.sum()) < state.settings.mean_patch:
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("models/nano"), help="where the finished model goes")
    parser.add_argument("--run", type=Path, default=Path("runs/nano"), help="where the run lives while it lasts")
    bound = parser.add_mutually_exclusive_group()
    bound.add_argument("--minutes", type=float, help="length of the run, both phases together (default 60)")
    bound.add_argument("--steps", type=int, help="steps of each phase, instead of minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mask-weight", type=float, help="weight of the block term; 0 trains a plain BLT (ablation)")
    parser.add_argument("--patcher-of", type=Path, help="take the patcher of the run in this folder, do not train one")
    parser.add_argument("--threads", type=int, help="CPU threads (default: one per core)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run, with its own settings")
    options = parser.parse_args(arguments)

    if options.threads:
        torch.set_num_threads(options.threads)
    saved = options.run / "state.pt"
    if options.resume:
        if not saved.exists():
            parser.error(f"nothing to resume: {saved} does not exist")
        state = State.load(saved)
    else:
        options.run.mkdir(parents=True, exist_ok=True)
        (options.run / "metrics.jsonl").unlink(missing_ok=True)
        minutes = None if options.steps else options.minutes or 60.0
        settings = Settings(minutes=minutes, steps=options.steps, seed=options.seed)
        if options.mask_weight is not None:
            settings = replace(settings, mask_weight=options.mask_weight)
        state = State.new(settings)
        if options.patcher_of:
            state.adopt_patcher(State.load(options.patcher_of / "state.pt"))
    training, held_out = standard_library()
    print(f"{training.num_bytes / 1e6:.1f} MB to learn from, {held_out.num_bytes / 1e6:.1f} MB held out", flush=True)
    try:
        train(state, training, options.run)
    except Stopped:
        print(f"stopped; go on with --resume --run {options.run}", file=sys.stderr)
        return 130
    result = export(state, training, held_out, options.run, options.out)
    print(f"{options.out}: {result.bits_per_byte:.3f} bits per byte held out", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
