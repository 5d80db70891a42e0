"""Turns a run, finished or not, into a model folder: weights, configuration, loss curve and model card.

`python -m training.export --run runs/nano --out models/nano`, on any machine that has the run's folder.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch

from engine import checkpoint

from .card import card
from .corpus import Corpus, corpora
from .evaluate import Evaluation, continuations, evaluate
from .metrics import Line, read_metrics
from .state import State

matplotlib.use("agg")
import matplotlib.pyplot as plt

SMOOTHING = 25


def export(state: State, training: Corpus, held_out: Corpus, run: Path, out: Path) -> Evaluation:
    """Writes the model to `out` in bfloat16, evaluates the written model, and writes its card.

    Raises ValueError for another text than the run's, and while there is no model yet; FileNotFoundError if
    the run's metrics are not there.
    """
    if state.corpus != training.digest:
        raise ValueError(f"the run in {run} learns from another text: give the --corpus that it began with")
    if not state.phases["model"].step:
        raise ValueError(f"the run in {run} still trains its patcher: there is no model to export yet")
    lines = read_metrics(run)
    weights = {name: weight.detach() for name, weight in state.weights.items()}
    checkpoint.save(out, state.config, weights, torch.bfloat16)
    plot(lines, out / "loss.png")
    loaded = checkpoint.load(out)
    result = evaluate(loaded.config, {n: t.float() for n, t in loaded.tensors.items()}, held_out)
    (out / "README.md").write_text(card(state, training, result, continuations(out)))
    return result


def plot(lines: Sequence[Line], picture: Path) -> None:
    """Draws the losses of all steps over the bytes seen, smoothed by a running mean."""
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    curves = (("patcher", "bits", "patcher: next byte"), ("model", "bits", "model: next byte"),
              ("model", "mask", "model: masked cells, 1/t-weighted"))  # fmt: skip
    for phase, key, label in curves:
        points = [(line["bytes"] / 1e6, line[key]) for line in lines if line["phase"] == phase and key in line]
        if not points:  # a patcher of another run, or one whose stages' metrics were left elsewhere
            continue
        seen, loss = np.array(points).T
        span = min(SMOOTHING, len(points))
        axes.plot(seen[span - 1 :], np.convolve(loss, np.full(span, 1 / span), "valid"), label=label)
    axes.set(xlabel="megabytes seen", ylabel="bits per byte of text (training)", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(picture, metadata={"Software": None})
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.export", description="Makes a model folder from a run, finished or not."
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--corpus", type=Path, help="the run's archive, if it was started with one")
    options = parser.parse_args(arguments)
    try:
        result = export(State.load(options.run), *corpora(options.corpus), options.run, options.out)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.out}: {result.bits_per_byte:.3f} bits per byte held out", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
