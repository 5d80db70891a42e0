"""Turns a finished run into a model folder: weights, configuration, loss curve and model card."""

import json
from pathlib import Path

import matplotlib
import numpy as np
import torch

from engine import checkpoint

from .card import card
from .corpus import Corpus
from .evaluate import Evaluation, continuations, evaluate
from .state import State

matplotlib.use("agg")
import matplotlib.pyplot as plt

SMOOTHING = 25


def export(state: State, training: Corpus, held_out: Corpus, run: Path, out: Path) -> Evaluation:
    """Writes the model to `out` in bfloat16, measures what was written, and describes it."""
    weights = {name: weight.detach() for name, weight in state.weights.items()}
    checkpoint.save(out, state.config, weights, torch.bfloat16)
    plot(run / "metrics.jsonl", out / "loss.png")
    loaded = checkpoint.load(out)
    result = evaluate(loaded.config, {n: t.float() for n, t in loaded.tensors.items()}, held_out)
    (out / "README.md").write_text(card(state, training, result, continuations(out)))
    return result


def plot(metrics: Path, picture: Path) -> None:
    """Draws the losses in `metrics` (JSON lines) over the bytes seen, smoothed by a running mean."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    curves = (("patcher", "bits", "patcher: next byte"), ("model", "bits", "model: next byte"),
              ("model", "mask", "model: masked cells, 1/t-weighted"))  # fmt: skip
    for phase, key, label in curves:
        points = [(line["bytes"] / 1e6, line[key]) for line in lines if line["phase"] == phase]
        if not points:  # a patcher of another run
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
