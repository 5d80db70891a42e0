"""Turns a run, finished or not, into a model folder: weights, configuration, loss curve and model card.

`python -m training.export --run runs/nano --out models/nano`, on any machine that has the run's folder.
"""

import argparse
import sys
from pathlib import Path

import torch

from engine import checkpoint

from .card import PROMPTS, card
from .corpus import Corpus, corpora
from .evaluate import EVALUATED_BYTES, Evaluation, evaluate
from .loops import generate, looping
from .metrics import read_metrics
from .plot import plot
from .state import State

SAMPLE_BYTES, SAMPLE_TEMPERATURE = 200, 0.6
CURVES = (("patcher", "bits", "patcher: next byte"), ("model", "bits", "model: next byte"),
          ("model", "mask", "model: masked cells, 1/t-weighted"))  # fmt: skip


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
    plot(lines, out / "loss.png", CURVES)
    loaded = checkpoint.load(out)
    sample = held_out.sample(EVALUATED_BYTES)
    result = evaluate(loaded.config, {n: t.float() for n, t in loaded.tensors.items()}, sample)
    samples = generate(out, [prompt.encode() for prompt in PROMPTS], SAMPLE_BYTES, SAMPLE_TEMPERATURE)
    (out / "README.md").write_text(card(state, training, result, looping(out, held_out), samples))
    return result


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
