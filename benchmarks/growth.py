"""Time per byte against the length of the context: ours and Hugging Face's, same weights, in turns at every length.

Random weights in the released form of BLT, whose decoder reads the encoder's states, as Hugging Face can run it.
Hugging Face runs without its cache, its only correct mode, and is left out where it would take too long. What a byte
costs that closes a patch, or none, comes from a second run, without running ahead: each of its steps makes one byte.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm import tqdm

from engine.config import BOS_ID, BYTE_OFFSET
from engine.counts import STAGES
from engine.engine import Engine
from engine.types import Delta, Failed, Request, Snapshot

from . import plot, report
from .generate import GREEDY, running_ahead
from .program import Content, Verdict, finish, parser, subject

if TYPE_CHECKING:
    from transformers import BltForCausalLM

TEXT = b"def growth(n: int) -> list[int]:\n    return [i * i for i in range(n) if i % 3]\n\n"
WINDOWED = ("patcher", "encoder", "decoder")
MOST_GROWTH = 1.2
"""Largest growth of the windowed stages' time per byte, over all lengths with full windows, that counts as flat on a
noisy machine."""


def main(arguments: Sequence[str] | None = None) -> None:
    program = parser("growth", __doc__, shape="nano")
    program.add_argument(
        "--lengths", type=int, nargs="+", default=[256, 512, 2048, 8192, 24000], help="bytes of context"
    )
    program.add_argument("--bytes", type=int, default=64, help="bytes that we generate per turn (%(default)s)")
    program.add_argument(
        "--hf-bytes", type=int, default=2, help="bytes that Hugging Face generates per turn (%(default)s)"
    )
    program.add_argument("--hf-most", type=int, default=8192, help="longest context of Hugging Face (%(default)s)")
    options = program.parse_args(arguments)
    options.dtype = options.dtype or ("float32" if options.shape in (None, "nano", "tiny") else "bfloat16")
    from transformers import BltForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with subject(options, form="hf") as model:
        # Enough for the caches to hold one sequence of the longest text, whose open patch has no bound. With the prefix
        # cache only the part of a prompt beyond the previous one is computed.
        engine = model.engine(max_sequences=1 + max(options.lengths) // 1024)
        window = max(spec.window or 0 for spec in engine.memory.caches.specs.values())
        theirs = BltForCausalLM.from_pretrained(model.path, dtype=getattr(torch, model.dtype))
        theirs.to(model.device)  # type: ignore[arg-type]
        rows = []
        with tqdm(total=len(options.lengths) * options.turns, disable=None) as bar:
            for length in options.lengths:
                rows.append(_measure(engine, theirs, length, options, bar))
    if model.dtype == "float32" and (wrong := [row["length"] for row in rows if not row["same_text"]]):
        raise SystemExit(f"the texts differ at {wrong}: these times compare nothing")
    finish("growth", model, {"window": window, "rows": rows}, options, arguments)


def _measure(
    engine: Engine, theirs: "BltForCausalLM", length: int, options: argparse.Namespace, bar: "tqdm[Any]"
) -> dict[str, Any]:
    prompt = [BOS_ID, *(byte + BYTE_OFFSET for byte in (TEXT * (length // len(TEXT) + 1))[: length - 1])]
    ours, opened, closing, hf = [], [], [], []
    stages: dict[str, list[float]] = {stage: [] for stage in STAGES}
    texts: list[list[int]] = []
    for _ in range(options.turns):
        steps, ids, before, after = _ours(engine, prompt, options.bytes)
        ours.append(1000 * sum(step.seconds for step in steps) / sum(step.num_bytes for step in steps))
        for stage, found in stages.items():
            seconds = after.stage_seconds[stage] - before.stage_seconds[stage]
            found.append(1000 * seconds / max(after.calls[stage] - before.calls[stage], 1))
        texts.append(ids[: options.hf_bytes])
        with running_ahead(engine, "never"):
            steps, ids, *_ = _ours(engine, prompt, options.bytes)
        opened += [1000 * step.seconds for step in steps if not step.closes]
        closing += [1000 * step.seconds for step in steps if step.closes]
        texts.append(ids[: options.hf_bytes])
        if length <= options.hf_most:
            seconds, hf_ids = _theirs(theirs, prompt, options.hf_bytes)
            hf.append(1000 * seconds)
            texts.append(hf_ids)
        bar.update()
    return {
        "length": length,
        "ms": statistics.median(ours),
        "ms_range": [min(ours), max(ours)],
        "ms_open": statistics.median(opened) if opened else None,
        "ms_closing": statistics.median(closing) if closing else None,
        "hf_ms": statistics.median(hf) if hf else None,
        "hf_ms_range": [min(hf), max(hf)] if hf else None,
        "ratio": statistics.median(h / o for h, o in zip(hf, ours, strict=True)) if hf else None,
        "ms_per_call": {stage: statistics.median(found) for stage, found in stages.items()},
        "same_text": all(text == texts[0] for text in texts),
    }


class Step(NamedTuple):
    """closes: whether any of its bytes closes a patch."""

    seconds: float
    closes: bool
    num_bytes: int


def _ours(engine: Engine, prompt: list[int], count: int) -> tuple[list[Step], list[int], Snapshot, Snapshot]:
    """The steps after the one that ends the prompt and gives the first id; all ids; counts before these steps and after
    them. Raises RuntimeError if the request fails."""
    engine.add(Request(id="growth", prompt_ids=prompt, max_tokens=count + 1, sampling=GREEDY, ignore_eos=True))
    steps: list[Step] = []
    ids: list[int] = []
    before = engine.snapshot()
    while engine.has_work:
        known, closed, began = len(ids), engine.ledger.total.calls["global"], time.perf_counter()
        for event in engine.step():
            if isinstance(event, Failed):
                raise RuntimeError(event.message)
            ids += event.ids if isinstance(event, Delta) else []
        if known:
            closes = engine.ledger.total.calls["global"] > closed
            steps.append(Step(time.perf_counter() - began, closes, len(ids) - known))
        else:
            before = engine.snapshot()
    return steps, ids, before, engine.snapshot()


@torch.inference_mode()
def _theirs(model: "BltForCausalLM", prompt: list[int], count: int) -> tuple[float, list[int]]:
    text = list(prompt)
    began = time.perf_counter()
    for _ in range(count):
        ids = torch.tensor([text], device=model.device)
        text.append(int(model(ids, use_cache=False).logits[0, -1].argmax()))
    return (time.perf_counter() - began) / count, text[len(prompt) :]


def render(content: Content) -> str:
    """The table of the README."""
    header = ["context, bytes", "ours, ms per byte", "a byte that closes no patch", "one that does", "transformers"]
    return report.table(
        [*header, "ratio"],
        [
            [f"{r['length']:,}"]
            + [_number(r[key], ".1f") for key in ("ms", "ms_open", "ms_closing")]
            + [_number(r["hf_ms"], ",.0f"), _number(r["ratio"], ",.0f", "x")]
            for r in content["rows"]
        ],
    )


def judge(content: Content) -> list[Verdict]:
    rows = content["rows"]
    # A window that is not full yet is shorter.
    first, last = next((row for row in rows if row["length"] >= content["window"]), rows[0]), rows[-1]
    grown = [sum(row["ms_per_call"][stage] for stage in WINDOWED) for row in (first, last)]
    factor = grown[1] / grown[0]
    global_ = last["ms_per_call"]["global"] / first["ms_per_call"]["global"]
    found = (
        f"windowed stages {factor:.2f} times as long at {last['length']:,} bytes of context as at {first['length']:,}"
    )
    return [Verdict("growth", "windowed stages flat", f"{found}, the global one {global_:.2f}", factor <= MOST_GROWTH)]


def draw(content: Content, path: Path) -> None:
    rows = content["rows"]
    lengths = [row["length"] for row in rows]
    with plot.axes(path, "bytes of context", "ms per byte", ticks=lengths) as on:
        lines = {"hf_ms": "transformers", "ms": "fastblt", "ms_open": "fastblt, byte that closes no patch"}
        for key, label in lines.items():
            known = [(row["length"], row[key]) for row in rows if row[key] is not None]
            on.plot([length for length, _ in known], [value for _, value in known], label=label)
        on.set_yscale("log")


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


if __name__ == "__main__":
    main()
