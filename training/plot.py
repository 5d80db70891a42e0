"""Loss curves of a run as a picture."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from .metrics import Line

matplotlib.use("agg")
import matplotlib.pyplot as plt

SMOOTHING = 25


def plot(lines: Sequence[Line], picture: Path, curves: Sequence[tuple[str, str, str]]) -> None:
    """Draws the losses of all steps over the bytes seen, smoothed by a running mean. curves: phase, figure, label."""
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    for phase, key, label in curves:
        points = [(line["bytes"] / 1e6, line[key]) for line in lines if line["phase"] == phase and key in line]
        if not points:  # a patcher of another run, or one whose stages' metrics were left elsewhere
            continue
        seen, loss = np.array(points).T
        span = min(SMOOTHING, 1 + len(points) // 4)
        axes.plot(seen[span - 1 :], np.convolve(loss, np.full(span, 1 / span), "valid"), label=label)
    axes.set(xlabel="megabytes seen", ylabel="bits per byte of text (training)", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(picture, metadata={"Software": None})
    plt.close(figure)
