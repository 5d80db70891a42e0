"""Time per byte against the length of the context: ours and Hugging Face's, same weights, one run.

Random weights in the shape of models/nano, in the released form of BLT (its decoder reads the encoder's states), which
is what Hugging Face can run; there without its cache, its only correct mode. Both take turns at every length.
"""

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm
from transformers import BltForCausalLM
from transformers.utils import logging

from engine.checkpoint import PRESETS, calibrated, random_tensors, save
from engine.config import BOS_ID, BYTE_OFFSET, EngineConfig
from engine.engine import Engine
from engine.types import Delta, Request, SamplingParams

from . import report

TEXT = b"def growth(n: int) -> list[int]:\n    return [i * i for i in range(n) if i % 3]\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096, 8192], help="bytes of context")
    parser.add_argument("--bytes", type=int, default=64, help="bytes that we generate per turn")
    parser.add_argument("--hf-bytes", type=int, default=2, help="bytes that Hugging Face generates per turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the JSON file and the picture")
    options = parser.parse_args()

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with TemporaryDirectory() as folder:
        _write_model(Path(folder))
        engine = Engine(EngineConfig(model=folder))
        theirs = BltForCausalLM.from_pretrained(folder, dtype=torch.float32)
        rows = []
        with tqdm(total=len(options.lengths) * options.turns, disable=None) as bar:
            for length in options.lengths:
                rows.append(_measure(engine, theirs, length, options, bar))
    _check_same_text(rows)
    path = report.write("growth", "make bench-growth", {"rows": rows}, options.out)
    _draw(rows, options.out / "growth.png")
    print(f"{render(rows)}\n\n{path}")


def render(rows: list[dict[str, Any]]) -> str:
    """The table that the README shows."""
    header = ["context, bytes", "ours, ms per byte", "a byte that closes no patch", "one that does", "transformers"]
    return report.table(
        [*header, "ratio"],
        [
            [f"{r['length']:,}"]
            + [f"{r[key]:.1f}" for key in ("ms", "ms_open", "ms_closing")]
            + [f"{r['hf_ms']:,.0f}", f"{r['ratio']:,.0f}x"]
            for r in rows
        ],
    )


def _write_model(folder: Path) -> None:
    config = replace(PRESETS["nano"], decoder_input="encoder", mask_id=None, block_size=None, isolate_documents=False)
    # Hugging Face's rule for the longest patch is not consistent between a text and its beginning.
    config = replace(config, patching=replace(config.patching, max_patch_length=None))
    tensors = random_tensors(config, 0)
    save(folder, calibrated(config, tensors), tensors)


def _measure(
    engine: Engine, theirs: BltForCausalLM, length: int, options: argparse.Namespace, bar: "tqdm[Any]"
) -> dict[str, Any]:
    prompt = [BOS_ID, *(byte + BYTE_OFFSET for byte in (TEXT * (length // len(TEXT) + 1))[: length - 1])]
    ours, opened, closing, hf = [], [], [], []
    texts: list[list[int]] = []
    for _ in range(options.turns):
        steps, ids = _ours(engine, prompt, options.bytes)
        ours.append(1000 * statistics.mean(seconds for seconds, _ in steps))
        opened += [1000 * seconds for seconds, closes in steps if not closes]
        closing += [1000 * seconds for seconds, closes in steps if closes]
        seconds, hf_ids = _theirs(theirs, prompt, options.hf_bytes)
        hf.append(1000 * seconds)
        texts += [ids[: options.hf_bytes], hf_ids]
        bar.update()
    return {
        "length": length,
        "ms": statistics.median(ours),
        "ms_range": [min(ours), max(ours)],
        "ms_open": statistics.median(opened),
        "ms_closing": statistics.median(closing),
        "hf_ms": statistics.median(hf),
        "hf_ms_range": [min(hf), max(hf)],
        "ratio": statistics.median(h / o for h, o in zip(hf, ours, strict=True)),
        "same_text": all(text == texts[0] for text in texts),
    }


def _ours(engine: Engine, prompt: list[int], count: int) -> tuple[list[tuple[float, bool]], list[int]]:
    """Seconds of every generating step and whether it closed a patch; the ids generated."""
    greedy = SamplingParams(temperature=0)
    engine.add(Request(id="growth", prompt_ids=prompt, max_tokens=count + 1, sampling=greedy, ignore_eos=True))
    steps: list[tuple[float, bool]] = []
    ids: list[int] = []
    while engine.has_work:
        generating, closed, began = bool(ids), engine.runner.counts.calls["global"], time.perf_counter()
        for event in engine.step():
            ids += event.ids if isinstance(event, Delta) else []
        if generating:
            steps.append((time.perf_counter() - began, engine.runner.counts.calls["global"] > closed))
    return steps, ids


@torch.inference_mode()
def _theirs(model: BltForCausalLM, prompt: list[int], count: int) -> tuple[float, list[int]]:
    text = list(prompt)
    began = time.perf_counter()
    for _ in range(count):
        text.append(int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    return (time.perf_counter() - began) / count, text[len(prompt) :]


def _check_same_text(rows: list[dict[str, Any]]) -> None:
    if wrong := [row["length"] for row in rows if not row["same_text"]]:
        raise SystemExit(f"the texts differ at {wrong}: these times compare nothing")


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    lengths = [row["length"] for row in rows]
    for key, label in (("hf_ms", "transformers"), ("ms", "fastblt"), ("ms_open", "fastblt, byte that closes no patch")):
        axes.plot(lengths, [row[key] for row in rows], marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel="bytes of context", ylabel="ms per byte")
    axes.minorticks_off()
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
