"""The same weights, the same prompt, greedy: our engine and Hugging Face `transformers` in turns.

Hugging Face runs without its cache, its only correct mode. Both times include the prompt.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine.engine import Engine
from engine.types import Delta, Failed, Request

from . import plot, report
from .generate import GREEDY, prompts
from .paired import in_turn, shown, spread
from .program import Content, Verdict, finish, parser, subject

if TYPE_CHECKING:
    from transformers import BltForCausalLM

LEAST, AT = 20, 256
PROMPT_BYTES = 63

Written = tuple[list[float], list[int]]
"""Seconds from the start to each id, and the ids."""


def main(arguments: Sequence[str] | None = None) -> None:
    program = parser("against_hf", __doc__, shape="nano")
    program.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048], help="new bytes")
    options = program.parse_args(arguments)
    options.dtype = options.dtype or ("float32" if options.shape in (None, "nano", "tiny") else "bfloat16")
    from transformers import BltForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with subject(options, form="hf") as model:
        engine = model.engine(max_sequences=4, prefix_cache=False)
        theirs = BltForCausalLM.from_pretrained(model.path, dtype=getattr(torch, model.dtype))
        theirs.to(model.device)  # type: ignore[arg-type]
        rows = measure(engine, theirs, sorted(options.lengths), options.turns)
    if model.dtype == "float32" and not all(row["same_text"] for row in rows):
        raise SystemExit("the texts differ: these times compare nothing")
    finish("against_hf", model, {"prompt_bytes": PROMPT_BYTES, "rows": rows}, options, arguments)


def measure(engine: Engine, theirs: "BltForCausalLM", lengths: Sequence[int], turns: int) -> list[dict[str, Any]]:
    prompt = prompts(1, PROMPT_BYTES)[0]
    _ours(engine, prompt, 8)
    _theirs(theirs, prompt, 1)
    pairs = in_turn(
        lambda: _ours(engine, prompt, lengths[-1]), lambda: _theirs(theirs, prompt, lengths[-1]), turns
    )  # fmt: skip
    return [
        {
            "length": length,
            "ratio": spread(hf[0][length - 1] / ours[0][length - 1] for ours, hf in pairs),
            "ms": spread(1000 * ours[0][length - 1] / length for ours, _ in pairs),
            "hf_ms": spread(1000 * hf[0][length - 1] / length for _, hf in pairs),
            "same_text": all(ours[1][:length] == hf[1][:length] for ours, hf in pairs),
        }
        for length in lengths
    ]


def _ours(engine: Engine, prompt: list[int], count: int) -> Written:
    began = time.perf_counter()
    engine.add(Request(id="it", prompt_ids=prompt, max_tokens=count, sampling=GREEDY, ignore_eos=True))
    times: list[float] = []
    ids: list[int] = []
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, Failed):
                raise RuntimeError(event.message)
            if isinstance(event, Delta):
                ids += event.ids
                times += [time.perf_counter() - began] * len(event.ids)
    return times, ids


@torch.inference_mode()
def _theirs(model: "BltForCausalLM", prompt: list[int], count: int) -> Written:
    began, text, times = time.perf_counter(), list(prompt), []
    for _ in range(count):
        ids = torch.tensor([text], device=model.device)
        text.append(int(model(ids, use_cache=False).logits[0, -1].argmax()))
        times.append(time.perf_counter() - began)
    return times, text[len(prompt) :]


def render(content: Content) -> str:
    return report.table(
        ["new bytes", "as fast as transformers", "ours, ms per byte", "transformers", "same text"],
        [
            [f"{row['length']:,}", f"{shown(row['ratio'], '.1f')} times", f"{row['ms']['median']:.1f}"]
            + [f"{row['hf_ms']['median']:.1f}", "yes" if row["same_text"] else "no"]
            for row in content["rows"]
        ],
    )


def judge(content: Content) -> list[Verdict]:
    rows = content["rows"]
    aim = f"at least {LEAST} times as fast at {AT} bytes, and growing with length"
    row = next((row for row in rows if row["length"] == AT), None)
    if row is None:
        last = rows[-1]
        found = f"{shown(last['ratio'], '.1f')} times at {last['length']}"
        return [Verdict("against transformers", aim, found, None)]
    found = f"{shown(row['ratio'], '.1f')} times at {AT}, {rows[-1]['ratio']['median']:.1f} at {rows[-1]['length']:,}"
    ratios = [row["ratio"]["median"] for row in rows]
    return [Verdict("against transformers", aim, found, row["ratio"]["median"] >= LEAST and ratios == sorted(ratios))]


def draw(content: Content, path: Path) -> None:
    rows = content["rows"]
    lengths = [row["length"] for row in rows]
    with plot.axes(path, "new bytes", "times as fast as transformers", ticks=lengths) as on:
        on.plot(lengths, [row["ratio"]["median"] for row in rows])
        on.fill_between(
            lengths, [r["ratio"]["least"] for r in rows], [r["ratio"]["most"] for r in rows], alpha=0.2, linewidth=0
        )
        on.set_ylim(bottom=0)


if __name__ == "__main__":
    main()
