"""Speed of the decoders against blt: same prompts, same engine, taking turns, a ratio per pair.

Prompts of three kinds, very differently predictable for models/nano: code like what it learnt from, English prose,
random bytes. What is written is compared too: exact decoders must write blt's bytes.
"""

import argparse
import random
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.config import BOS_ID, BYTE_OFFSET, EngineConfig
from engine.decoders import EXACT
from engine.engine import Engine
from engine.types import Delta, Failed, Request, SamplingParams
from training.corpus import standard_library

from . import report

WAYS: dict[str, dict[str, Any]] = {
    "auto": {"decoder": "auto"},
    "BLT-S k=4": {"decoder": "blt-s", "draft_length": 4},
    "BLT-S k=8": {"decoder": "blt-s", "draft_length": 8},
    "BLT-DV-4": {"decoder": "blt-dv", "block_size": 4},
    "BLT-DV-8": {"decoder": "blt-dv", "block_size": 8},
    "BLT-D-8": {"decoder": "blt-d", "block_size": 8},
}
KINDS = ("code", "prose", "random")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoders", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/nano"))
    parser.add_argument("--prompts", type=int, default=8, help="of each kind")
    parser.add_argument("--bytes", type=int, default=256, help="generated behind each prompt")
    parser.add_argument("--concurrency", type=int, default=1, help="requests at a time")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the JSON file")
    options = parser.parse_args()

    engine = Engine(EngineConfig(model=str(options.model), dtype=options.dtype))
    texts = _texts(options.prompts)
    rows = []
    _run(engine, texts["code"][:2], {"decoder": "blt"}, options)
    with tqdm(total=len(KINDS) * len(options.ways) * options.turns, disable=None) as bar:
        for kind in KINDS:
            for way in options.ways:
                rows.append(_compare(engine, kind, way, texts[kind], options, bar))
    if wrong := [row for row in rows if not row["same_text"] and WAYS[row["decoder"]]["decoder"] in EXACT]:
        print(f"not blt's text: {wrong}", file=sys.stderr)
    path = report.write("decoders", _command(), {"concurrency": options.concurrency, "rows": rows}, options.out)
    print(f"{render(rows)}\n\n{path}")


def _command() -> str:
    arguments = shlex.join(sys.argv[1:])
    return f'make bench-decoders ARGS="{arguments}"' if arguments else "make bench-decoders"


def render(rows: list[dict[str, Any]]) -> str:
    """Speed-up over blt, median and range, a column per kind of prompt."""
    lines = []
    for way in dict.fromkeys(row["decoder"] for row in rows):
        cells = [way]
        for kind in KINDS:
            row = next(row for row in rows if (row["decoder"], row["kind"]) == (way, kind))
            cells.append(f"{row['ratio']:.2f} ({row['range'][0]:.2f} to {row['range'][1]:.2f})")
        lines.append(cells)
    return report.table(["speed-up over BLT", *KINDS], lines)


def _compare(
    engine: Engine, kind: str, way: str, prompts: list[list[int]], options: argparse.Namespace, bar: "tqdm[Any]"
) -> dict[str, Any]:
    ratios, rates, same = [], [], True
    for _ in range(options.turns):
        blt, wanted = _run(engine, prompts, {"decoder": "blt"}, options)
        seconds, found = _run(engine, prompts, WAYS[way], options)
        ratios.append(blt / seconds)
        rates.append(sum(map(len, found)) / seconds)
        same &= found == wanted
        bar.update()
    return {
        "kind": kind,
        "decoder": way,
        "ratio": statistics.median(ratios),
        "range": [min(ratios), max(ratios)],
        "bytes_per_second": statistics.median(rates),
        "same_text": same,
    }


def _run(
    engine: Engine, prompts: list[list[int]], how: dict[str, Any], options: argparse.Namespace
) -> tuple[float, list[list[int]]]:
    """Seconds for all prompts, so many at a time, from their first byte on, and what was written."""
    total = 0.0
    texts: list[list[int]] = [[] for _ in prompts]
    numbered = list(enumerate(prompts))
    for first in range(0, len(prompts), options.concurrency):
        for seed, prompt in numbered[first : first + options.concurrency]:
            sampling = SamplingParams(temperature=options.temperature, seed=seed)
            request = Request(
                id=str(seed), prompt_ids=prompt, max_tokens=options.bytes, sampling=sampling, ignore_eos=True, **how
            )
            engine.add(request)
        began = 0.0
        while engine.has_work:
            for event in engine.step():
                if isinstance(event, Failed):
                    raise RuntimeError(event.message)
                if isinstance(event, Delta):
                    began = began or time.perf_counter()
                    texts[int(event.id)] += event.ids
        total += time.perf_counter() - began
    return total, texts


def _texts(count: int) -> dict[str, list[list[int]]]:
    draw = random.Random(0)
    code = [text for text in standard_library()[1].texts if len(text) > 1000]
    prose = Path(__file__).parents[1].joinpath("LICENSE").read_bytes()

    def ids(data: bytes) -> list[int]:
        return [BOS_ID, *(byte + BYTE_OFFSET for byte in data)]

    def cut(text: bytes) -> bytes:
        start = draw.randrange(len(text) - 200)
        return text[start : start + 200]

    return {
        "code": [ids(cut(draw.choice(code))) for _ in range(count)],
        "prose": [ids(cut(prose)) for _ in range(count)],
        "random": [ids(draw.randbytes(200)) for _ in range(count)],
    }


if __name__ == "__main__":
    main()
