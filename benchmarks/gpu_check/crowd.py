"""The 1B shape with many concurrent requests of one decoder: the gain of a batch. See `shape_1b` for the figures."""

from functools import partial

import torch

from benchmarks.generate import generate, prompts
from benchmarks.models import random_model
from benchmarks.paired import figures, in_turn
from benchmarks.replay import replayed
from benchmarks.variants import RANDOM
from engine.costs import bandwidth

from .piece import Piece
from .probe import copy_size
from .setting import Setting
from .shape_1b import shape_of

CONCURRENCY = (16, 64)
WAYS = {name: how for name, how in RANDOM["fast"].items() if name != "blt-s k=16"}
CACHE_BYTES_64 = 12 << 30


def measure(setting: Setting, piece: Piece) -> None:
    peak = bandwidth.copy_rate(torch.device(setting.device), copy_size(setting))
    shape, cache_bytes = shape_of(setting)
    piece.put(copy_gb_s=peak / 1e9, shape=shape)
    numbers, count, turns = ((2, 3), 12, 1) if setting.quick else (CONCURRENCY, 128, 2)
    engine = setting.engine(
        random_model(setting.work, shape, "fast", device=setting.device),
        dtype="bfloat16",
        max_sequences=max(numbers),
        cache_bytes=cache_bytes if setting.quick else CACHE_BYTES_64,
    )
    wrap = replayed(engine)
    for number in numbers:
        texts = prompts(number, 20 if setting.quick else 100)
        runs = {way: partial(generate, engine, texts, count, how, wrap) for way, how in WAYS.items()}
        for way, run in runs.items():
            run()
            row = figures(in_turn(runs["blt"], run, turns), [peak] * turns)
            piece.row("speed", {"concurrency": number, "decoder": way, **row})
