"""Checks that all ways of running a model write the same bytes, on a small random model and models/nano, in both
dtypes.

All prompts and decoders run as one mixed batch. The texts are compared with `blt` of the same engine, with the same
kernels launched one by one, with each decoder alone and the host launching as far ahead as it can, and with torch's
kernels on the same device. In float32 the exact decoders must equal `blt`, and recorded graphs and launches ahead must
equal single launches; how often another order of summation changes a text is only reported.
"""

from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.generate import prompts
from benchmarks.models import random_model
from benchmarks.report import NANO
from engine.decoders import DECODERS
from engine.engine import Engine
from engine.types import Delta, Failed, Request, SamplingParams, UnmaskRule

from .piece import Piece
from .setting import Setting

WAYS: dict[str, dict[str, Any]] = {
    "blt": {"decoder": "blt"},
    "blt-s": {"decoder": "blt-s", "draft_length": 6},
    "blt-d": {"decoder": "blt-d", "unmask": UnmaskRule(rule="confidence", alpha=0.4)},
    "blt-dv": {"decoder": "blt-dv", "unmask": UnmaskRule(rule="entropy", gamma=3.0)},
}
Texts = dict[str, list[list[int]]]
"""Per decoder, the ids generated after each prompt."""
AHEAD = "ahead"
"""In the name of a variant: each decoder by itself, and whatever can be launched ahead is."""


def variants(setting: Setting) -> dict[str, dict[str, Any]]:
    """Ways of running the same model; the first is the device's default."""
    if not setting.on_gpu:
        return {
            "torch, at once": {"kernels": "torch"},
            "torch, padded": {"kernels": "torch", "graphs": True},
            "torch, padded, ahead": {"kernels": "torch", "graphs": True},
        }
    return {
        "triton, graphs": {"kernels": "triton", "graphs": True},
        "triton, graphs, ahead": {"kernels": "triton", "graphs": True},
        "triton, at once": {"kernels": "triton", "graphs": False},
        "torch, at once": {"kernels": "torch", "graphs": False},
    }


def measure(setting: Setting, piece: Piece) -> None:
    random = random_model(setting.work, "tiny", "fast", dtype=torch.float32)
    released = random_model(setting.work, "tiny", "released", dtype=torch.float32)
    models = {"tiny, random": random, "tiny, random, released form": released, "nano": NANO}
    cases = [(name, dtype) for name in models for dtype in ("float32", "bfloat16")]
    # Most of their time goes to Triton's compiler and the host.
    with ProcessPoolExecutor(len(cases) if setting.on_gpu else 1, get_context("spawn")) as pool:
        running = {pool.submit(texts_of_variants, setting, models[name], dtype): (name, dtype) for name, dtype in cases}
        for done in as_completed(running):
            name, dtype = running[done]
            for row in compare(done.result()):
                piece.row("texts", {"model": name, "dtype": dtype, **row})
                if dtype == "float32":
                    judge(name, row, piece)


def texts_of_variants(setting: Setting, model: Path, dtype: str) -> dict[str, Texts]:
    """A model's texts in each variant."""
    num_prompts, count = (2, 8) if setting.quick else (16, 96)
    found = {}
    for variant, choices in variants(setting).items():
        engine = setting.engine(model, dtype=dtype, **choices)
        alone = AHEAD in variant
        if alone:
            # Launches everything that can be launched before the host reads the earlier results.
            engine.stepper.ahead.policy = "always"
        found[variant] = texts_of(engine, num_prompts, count, mixed=not alone)
        del engine
    return found


def compare(found: dict[str, Texts]) -> list[dict[str, Any]]:
    """A row per decoder: shares of prompts that differ, from blt in each variant, and between variants."""
    first, *others = found
    rows = []
    for way in next(iter(found.values())):
        row: dict[str, Any] = {"decoder": way, "prompts": len(found[first][way])}
        row["from blt"] = {variant: _differ(texts[way], texts["blt"]) for variant, texts in found.items()}
        row["from the first"] = {other: _differ(found[other][way], found[first][way]) for other in others}
        rows.append(row)
    return rows


def judge(model: str, row: dict[str, Any], piece: Piece) -> None:
    way = row["decoder"]
    for variant, share in row["from blt"].items():
        # Torch's own products on a GPU are not row-invariant; the engine logs so when it starts.
        promised = variant.startswith("triton") or "triton, graphs" not in row["from blt"]
        if share and promised and DECODERS[WAYS[way]["decoder"]].exact:
            piece.fail(f"{model}, float32, {variant}: {way} differs from blt in {share:.0%} of the prompts")
    for variant, share in row["from the first"].items():
        if share and not variant.startswith("torch, at once"):
            first = next(iter(row["from blt"]))
            piece.fail(f"{model}, float32, {way}: {variant} and {first} differ in {share:.0%} of the prompts")


def _differ(texts: list[list[int]], others: list[list[int]]) -> float:
    return sum(a != b for a, b in zip(texts, others, strict=True)) / len(texts)


def texts_of(engine: Engine, num_prompts: int, count: int, *, mixed: bool = True) -> Texts:
    """Generates `count` ids after each prompt with every decoder of the model, half of them greedy, half sampled.
    mixed: all decoders in one batch, or one after the other."""
    ways = {way: how for way, how in WAYS.items() if how["decoder"] in engine.limits.decoders}
    texts: Texts = {way: [[] for _ in range(num_prompts)] for way in ways}

    def run() -> None:
        while engine.has_work:
            for event in engine.step():
                if isinstance(event, Failed):
                    raise RuntimeError(event.message)
                if isinstance(event, Delta):
                    way, _, number = event.id.rpartition(" ")
                    texts[way][int(number)] += event.ids

    for way, how in ways.items():
        for i, prompt in enumerate(prompts(num_prompts, 48)):
            sampling = SamplingParams(temperature=0.8 * (i % 2), seed=i)
            asked: dict[str, Any] = {
                "prompt_ids": prompt[: 20 + i],
                "max_tokens": count,
                "sampling": sampling,
                "ignore_eos": True,
            }
            engine.add(Request(id=f"{way} {i}", **asked, **how))
        if not mixed:
            run()
    run()
    return texts
