"""Compares runs of different recipes on the same held-out files: `python -m training.recipes RUN...`.

Prints a table of what each run's last state reaches, and draws the losses of all over the run.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from .corpus import Corpus, corpora
from .evaluate import Evaluation, evaluate
from .metrics import Line, read_metrics
from .state import Settings, State

matplotlib.use("agg")
import matplotlib.pyplot as plt

PANELS = (("bits", "next byte, bits per byte (training)"), ("mask", "masked cells, bits per byte of text (training)"))
SMOOTHING = 60
"""Steps averaged for a point of a curve."""
BOUNDS = ("minutes", "steps", "seed", "patcher_share")
"""Settings that are no part of a recipe."""


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run, its steps' metrics, and what its last state reaches on held-out files."""

    name: str
    state: State
    lines: list[Line]
    found: Evaluation

    @property
    def recipe(self) -> str:
        """The settings that differ from the defaults."""
        plain, own = (asdict(s) for s in (Settings(minutes=1.0), self.state.settings))
        return ", ".join(f"{k} {v}" for k, v in own.items() if v != plain[k] and k not in BOUNDS) or "defaults"


def load(folder: Path, held_out: Corpus) -> Run:
    """Evaluates the state in a run's folder. Raises StateError, PartError, FileNotFoundError or ValueError."""
    state = State.load(folder)
    weights = {name: weight.detach() for name, weight in state.weights.items()}
    return Run(folder.name, state, read_metrics(folder), evaluate(state.config, weights, held_out))


def table(runs: Sequence[Run]) -> str:
    """A Markdown table, a row for each run."""
    head = "| run | recipe | minutes | steps | MB | bits per byte | drafts kept, of the first 4 bytes | of all 8 |"
    rows = [head, "|---" * 8 + "|"]
    for run in runs:
        phase = run.state.phases["model"]
        cells: list[Any] = [run.name, run.recipe, f"{phase.seconds / 60:.1f}", phase.step, f"{phase.bytes / 1e6:.1f}"]
        cells += [f"{run.found.bits_per_byte:.3f}", *(f"{share:.1%}" for share in run.found.kept)]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


def draw(runs: Sequence[Run], picture: Path) -> None:
    """Training losses over the share of the model's phase that is done, a curve for each run."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), dpi=110, layout="constrained")
    for (key, label), axes in zip(PANELS, panels, strict=True):
        for run in runs:
            last = run.state.phases["model"].step
            points = [
                (line["step"] / last, line[key]) for line in run.lines if line["phase"] == "model" and key in line
            ]
            if not points:
                continue
            shares, loss = np.array(points).T
            span = min(SMOOTHING, 1 + len(points) // 4)
            axes.plot(shares[span - 1 :], np.convolve(loss, np.full(span, 1 / span), "valid"), label=run.name)
        axes.set(xlabel="share of the run", ylabel=label, yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(which="both", alpha=0.3)
        axes.legend()
    figure.savefig(picture, metadata={"Software": None})
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.recipes", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    parser.add_argument("--picture", type=Path, help="draw the curves here, as a PNG")
    parser.add_argument("--corpus", type=Path, help="the runs' archive, if they were started with one")
    most = "most bytes of held-out files to read (default %(default)s)"
    parser.add_argument("--held-out-bytes", type=int, default=256 << 10, help=most)
    options = parser.parse_args(arguments)
    try:
        training, held_out = corpora(options.corpus)
        held_out = held_out.sample(options.held_out_bytes)
        runs = [load(folder, held_out) for folder in options.runs]
        for run in runs:
            if run.state.corpus != training.digest:
                raise ValueError(f"the run in {run.name} learnt from another text: give the --corpus of all runs")
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(table(runs))
    if options.picture:
        draw(runs, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
