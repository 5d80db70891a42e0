"""The paper's 1B shape with random weights, one request at a time: is decoding bound by memory, and do the decoders
keep what the bytes that they read promise?

bandwidth use: bytes read per second, as the engine counts them, over what a plain copy moves in the same process.
realisation: the speed-up over blt by the clock over the one that the counted bytes predict, in paired turns.

Drafts of random weights are never right: all figures but blt's are with replayed acceptance (see `replay`). Hash tables
have a fiftieth of their rows, which changes nothing of what a byte reads, and patches have at most 8 bytes.
"""

import gc
import statistics
import time
from typing import Any

import torch

from engine import bandwidth
from engine.decoders import Decoder, make_decoder
from engine.decoders.auto import Experience
from engine.engine import Engine
from engine.sizing import PAPER_ACCEPTANCE, PAPER_PASSES
from engine.types import Request, Unmask

from . import models
from .generate import Reading, Wrap, generate, prompts
from .piece import Piece
from .probe import copy_size
from .replay import Replayed, gamma_for
from .setting import Setting

DIFFUSION = Unmask(rule="entropy", gamma=gamma_for(8, PAPER_PASSES[8]))
WAYS: dict[models.Form, dict[str, dict[str, Any]]] = {
    "fast": {
        "blt": {"decoder": "blt"},
        "blt-s k=8": {"decoder": "blt-s", "draft_length": 8},
        "blt-s k=16": {"decoder": "blt-s", "draft_length": 16},
        "blt-d B=8": {"decoder": "blt-d", "unmask": DIFFUSION},
        "blt-dv B=8": {"decoder": "blt-dv"},
    },
    "released": {
        "blt": {"decoder": "blt"},
        "blt-s k=8": {"decoder": "blt-s", "draft_length": 8},
    },
}


def measure(setting: Setting, piece: Piece) -> None:
    device = torch.device(setting.device)
    peak = bandwidth.copy_rate(device, copy_size(setting))
    shape = "toy stacks in the form of the 1B" if setting.quick else "1B"
    piece.put(copy_gb_s=peak / 1e9, shape=shape, hash_rows=models.config_1b("fast", toy=setting.quick).hashes.rows)
    for form in WAYS:
        began = time.perf_counter()
        model = models.shape_1b(setting, form)
        piece.put(**{f"seconds_to_make_{form}": time.perf_counter() - began})
        for float8 in (False, True) if setting.has_float8() else (False,):
            engine = Engine(setting.engine(model, dtype="bfloat16", float8=float8, max_sequences=4))
            for row in _compare(engine, form, peak, setting):
                piece.row("speed", {"form": form, "weights": "float8" if float8 else "bfloat16", **row})
            del engine
            gc.collect()


def replayed(engine: Engine) -> Wrap:
    """What decodes a request with replayed acceptance, from the paper's rate for its decoder and length."""

    def wrap(request: Request) -> Decoder:
        size = engine.model_config.block_size
        decoder = make_decoder(request, size, engine.runner.costs, Experience())
        length = request.draft_length if request.decoder == "blt-s" else size or 0
        rate = PAPER_ACCEPTANCE.get((request.decoder, length))
        return decoder if rate is None else Replayed(decoder, rate, length, seed=0)

    return wrap


def _compare(engine: Engine, form: models.Form, peak: float, setting: Setting) -> list[dict[str, Any]]:
    count, turns = (16, 1) if setting.quick else (320, 3)
    prompt, wrap = prompts(1, 20 if setting.quick else 100), replayed(engine)
    warm_up = {}
    for way, how in WAYS[form].items():
        began = time.perf_counter()
        generate(engine, prompt, count, how, wrap)
        warm_up[way] = time.perf_counter() - began
    rows = []
    for way, how in WAYS[form].items():
        pairs = [
            (generate(engine, prompt, count, WAYS[form]["blt"], wrap), generate(engine, prompt, count, how, wrap))
            for _ in range(turns)
        ]
        row = figures(pairs, peak)
        rows.append({"decoder": way, "acceptance": _label(how), **row, "warm_up_seconds": warm_up[way]})
    return rows


def figures(pairs: list[tuple[Reading, Reading]], peak: float) -> dict[str, Any]:
    """What paired turns of blt and another say. peak: bytes per second of a copy."""
    ratios = [found.bytes_per_second / blt.bytes_per_second for blt, found in pairs]
    predicted = [blt.read_per_byte / found.read_per_byte for blt, found in pairs]
    read = [found.read_bytes / found.seconds for _, found in pairs]
    last = pairs[-1][1]
    return {
        "bytes_per_second": statistics.median(found.bytes_per_second for _, found in pairs),
        "over_blt": statistics.median(ratios),
        "range": [min(ratios), max(ratios)],
        "predicted": statistics.median(predicted),
        "realisation": statistics.median(r / p for r, p in zip(ratios, predicted, strict=True)),
        "read_gb_s": statistics.median(read) / 1e9,
        "bandwidth_use": statistics.median(read) / peak,
        "read_mb_per_byte": last.read_per_byte / 1e6,
        "bytes_per_round": last.committed / last.rounds,
        "decoder_calls_per_byte": last.decoder_calls / last.committed,
        "global_calls_per_byte": last.global_calls / last.committed,
        "ms_per_step": 1000 * last.seconds / last.steps,
    }


def _label(how: dict[str, Any]) -> str:
    return "none needed" if how["decoder"] == "blt" else "replayed acceptance"
