"""Speed of models/nano: every decoder alone and batched with its like, stages launched directly and as graphs."""

import statistics
import time
from typing import Any

from benchmarks.generate import generate, prompts
from benchmarks.report import NANO
from engine.config import DtypeName
from engine.engine import Engine

from .piece import Piece
from .setting import Setting

WAYS: dict[str, dict[str, Any]] = {
    "blt": {"decoder": "blt"},
    "blt-s k=8": {"decoder": "blt-s", "draft_length": 8},
    "blt-d B=8": {"decoder": "blt-d"},
    "blt-dv B=8": {"decoder": "blt-dv"},
}
CONCURRENCY = (1, 16)


def measure(setting: Setting, piece: Piece) -> None:
    dtypes: tuple[DtypeName, ...] = ("bfloat16",) if setting.quick else ("bfloat16", "float32")
    for dtype in dtypes:
        for graphs in (True, False):
            engine = setting.engine(NANO, dtype=dtype, graphs=graphs)
            for concurrency in (2,) if setting.quick else CONCURRENCY:
                for row in _compare(engine, concurrency, setting):
                    piece.row("speed", {"dtype": dtype, "graphs": graphs, "concurrency": concurrency, **row})
            del engine


def _compare(engine: Engine, concurrency: int, setting: Setting) -> list[dict[str, Any]]:
    count, turns = (12, 1) if setting.quick else (192, 3)
    texts = prompts(concurrency, 20 if setting.quick else 100)
    warm_up = {}
    for way, how in WAYS.items():
        began = time.perf_counter()
        generate(engine, texts, count, how)
        warm_up[way] = time.perf_counter() - began
    rows = []
    for way, how in WAYS.items():
        rates, ratios = [], []
        for _ in range(turns):
            blt = generate(engine, texts, count, WAYS["blt"])
            found = generate(engine, texts, count, how)
            rates.append(found.bytes_per_second)
            ratios.append(found.bytes_per_second / blt.bytes_per_second)
        rows.append(
            {
                "decoder": way,
                "bytes_per_second": statistics.median(rates),
                "over_blt": statistics.median(ratios),
                "range": [min(ratios), max(ratios)],
                "bytes_per_round": found.committed / found.rounds,
                "ms_per_step": 1000 * found.seconds / found.steps,
                "warm_up_seconds": warm_up[way],
            }
        )
    return rows
