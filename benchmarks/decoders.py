"""Speed of the decoders against blt: same prompts, same engine, in turns, a ratio per pair.

Prompts of three kinds, very differently predictable for models/nano: code like its training data, English prose, random
bytes. Texts are compared too: exact decoders must write blt's bytes.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from engine.config import BOS_ID, BYTE_OFFSET
from engine.decoders import DECODERS
from engine.engine import Engine
from engine.types import Delta, Failed, Request, SamplingParams
from training.corpus import standard_library

from . import report
from .generate import as_served
from .paired import shown
from .program import Content, Verdict, finish, parser, subject

WAYS: dict[str, dict[str, Any]] = {
    "auto": {"decoder": "auto"},
    "BLT-S k=4": {"decoder": "blt-s", "draft_length": 4},
    "BLT-S k=8": {"decoder": "blt-s", "draft_length": 8},
    "BLT-DV-4": {"decoder": "blt-dv", "block_size": 4},
    "BLT-DV-8": {"decoder": "blt-dv", "block_size": 8},
    "BLT-D-8": {"decoder": "blt-d", "block_size": 8},
}
KINDS = ("code", "prose", "random")


def main(arguments: Sequence[str] | None = None) -> None:
    program = parser("decoders", __doc__)
    program.add_argument("--prompts", type=int, default=8, help="of each kind")
    program.add_argument("--bytes", type=int, default=256, help="bytes generated after each prompt")
    program.add_argument("--concurrency", type=int, default=1, help="requests at a time")
    program.add_argument("--temperature", type=float, default=0.0)
    program.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    options = program.parse_args(arguments)
    texts = _texts(options.prompts)
    rows = []
    with subject(options) as model:
        engine = model.engine(prefix_cache=False)
        with as_served(engine), tqdm(total=len(KINDS) * len(options.ways) * options.turns, disable=None) as bar:
            _run(engine, texts["code"][:2], {"decoder": "blt"}, options)
            for kind in KINDS:
                for way in options.ways:
                    rows.append(_compare(engine, kind, way, texts[kind], options, bar))
    if wrong := [row for row in rows if not row["same_text"] and DECODERS[WAYS[row["decoder"]]["decoder"]].exact]:
        print(f"not blt's text: {wrong}", file=sys.stderr)
    finish("decoders", model, {"concurrency": options.concurrency, "rows": rows}, options, arguments)


def render(content: Content) -> str:
    """Speed-up over blt, median and range, a column per kind of prompt."""
    rows = content["rows"]
    lines = []
    for way in dict.fromkeys(row["decoder"] for row in rows):
        cells = [way]
        for kind in KINDS:
            row = next(row for row in rows if (row["decoder"], row["kind"]) == (way, kind))
            least, most = row["range"]
            cells.append(shown({"median": row["ratio"], "least": least, "most": most}))
        lines.append(cells)
    return report.table(["speed-up over BLT", *KINDS], lines)


def judge(content: Content) -> list[Verdict]:
    code = [row for row in content["rows"] if row["kind"] == "code"]
    best = max(code, key=lambda row: row["ratio"])
    return [Verdict("decoders on code", "", f"{best['ratio']:.2f} times blt for {best['decoder']}, the most", None)]


def _compare(
    engine: Engine, kind: str, way: str, prompts: list[list[int]], options: argparse.Namespace, bar: "tqdm[Any]"
) -> dict[str, Any]:
    ratios, rates, same = [], [], True
    for _ in range(options.turns):
        blt, wanted = _run(engine, prompts, {"decoder": "blt"}, options)
        rate, found = _run(engine, prompts, WAYS[way], options)
        ratios.append(rate / blt)
        rates.append(rate)
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
    """Bytes per second over all prompts, `concurrency` at a time, and the texts.

    Each group counts from the end of the step in which its last text has begun. Bytes up to then do not count, as the
    prompts are read in that time, and how many come first depends on the decoder. Raises RuntimeError if a request
    fails, or if no bytes count.
    """
    seconds, counted = 0.0, 0
    texts: list[list[int]] = [[] for _ in prompts]
    numbered = list(enumerate(prompts))
    for first in range(0, len(prompts), options.concurrency):
        group = numbered[first : first + options.concurrency]
        for seed, prompt in group:
            sampling = SamplingParams(temperature=options.temperature, seed=seed)
            request = Request(
                id=str(seed), prompt_ids=prompt, max_tokens=options.bytes, sampling=sampling, ignore_eos=True, **how
            )
            engine.add(request)
        began = None
        while engine.has_work:
            for event in engine.step():
                if isinstance(event, Failed):
                    raise RuntimeError(event.message)
                if isinstance(event, Delta):
                    texts[int(event.id)] += event.ids
                    counted += len(event.ids) if began is not None else 0
            if began is None and all(texts[seed] for seed, _ in group):
                began = time.perf_counter()
        seconds += 0.0 if began is None else time.perf_counter() - began
    if not counted:
        raise RuntimeError("no text goes on after its first step: --bytes must be larger")
    return counted / seconds, texts


def _texts(count: int) -> dict[str, list[list[int]]]:
    draw = random.Random(0)
    code = [text for text in standard_library()[1].texts if len(text) > 1000]
    prose = report.ROOT.joinpath("LICENSE").read_bytes()

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
