"""Whether constrained texts are right, and what bytes that a grammar forces save: it counts, and times nothing.

Every prompt is answered under every grammar, greedily and sampled, by blt, blt-s and blt-dv, with forced bytes taken as
drafts and without. All six must write the same bytes, and other libraries must find that they match. Exit codes: 0 all
hold, 1 a text is wrong (the first wrong ones are shown), or forced bytes save no decoder calls of JSON.
"""

import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

from tqdm import tqdm

from engine.config import BOS_ID, BYTE_OFFSET
from engine.engine import Engine
from engine.grammars import Constraint
from engine.types import Failed, Finished, Request, SamplingParams

from . import report
from .generate import TEXT
from .grammars import GRAMMARS, Grammar
from .program import Content, Subject, Verdict, finish, parser, subject

WAYS: dict[str, dict[str, Any]] = {
    "blt": {"decoder": "blt"},
    "blt-s k=8": {"decoder": "blt-s", "draft_length": 8},
    "blt-dv B=8": {"decoder": "blt-dv", "block_size": 8},
}
AT_A_TIME = 32
"""Requests that the engine runs together."""
LONGEST_PROMPT = 160
COUNTS = ("texts", "cut", "bytes")
SHOWN = 20
"""Most wrong texts that are shown."""


class Answer(NamedTuple):
    """text: bytes of the ids. reason: why it ended."""

    text: bytes
    reason: str
    decoder_calls: int


def main(arguments: Sequence[str] | None = None) -> int:
    program = parser("constraints", __doc__, in_turns=False)
    program.add_argument("--prompts", type=int, default=200, help="for each grammar (%(default)s)")
    program.add_argument("--bytes", type=int, default=64, help="most bytes of a text (%(default)s)")
    options = program.parse_args(arguments)
    with subject(options) as model:
        figures, wrong = measure(model, prompts(options.prompts), options.bytes)
    finish("constraints", model, figures, options, arguments)
    for fault in wrong[:SHOWN]:
        print(fault, file=sys.stderr)
    return 0 if all(verdict.met for verdict in judge(figures)) else 1


def prompts(count: int) -> list[bytes]:
    """Of 0 to LONGEST_PROMPT bytes: code, prose, random bytes, and the beginnings of texts that some grammars allow."""
    draw = random.Random(0)
    sources = [TEXT.read_bytes(), report.ROOT.joinpath("LICENSE").read_bytes(), draw.randbytes(10_000)]
    sources.append('{"name": "Łukasz", "age": 41} [настройки]\nцвет = «青»\n{"größe": [1, 2.5e3, null]}\n'.encode() * 9)
    found = []
    for number in range(count):
        source, length = sources[number % len(sources)], draw.randint(0, LONGEST_PROMPT)
        start = draw.randrange(len(source) - length)
        found.append(source[start : start + length])
    return found


def measure(model: Subject, prompts: Sequence[bytes], most: int) -> tuple[dict[str, Any], list[str]]:
    """The figures, and a line about every wrong text."""
    engine = model.engine(max_sequences=AT_A_TIME)
    rows, wrong = list[dict[str, Any]](), list[str]()
    with tqdm(total=2 * len(WAYS) * len(GRAMMARS), disable=None) as bar:
        for name, grammar in GRAMMARS.items():
            wanted: dict[str, Answer] = {}
            for way, how in WAYS.items():
                row: dict[str, Any] = {"grammar": name, "decoder": way, "is_json": grammar.schema is not None}
                for forces in (False, True):
                    with forced_bytes(forces):
                        found = answers(engine, requests(prompts, grammar, most, how))
                    # blt without forced bytes comes first: nothing is drafted there.
                    wanted = wanted or found
                    ran = f"{model.said}, {way} {'with' if forces else 'without'} forced bytes, {name}"
                    wrong += faults(ran, prompts, grammar, wanted, found)
                    row["calls" if forces else "calls_without"] = sum(answer.decoder_calls for answer in found.values())
                    row |= {"texts": len(found), "bytes": sum(len(answer.text) for answer in found.values())}
                    row["cut"] = sum(answer.reason == "length" for answer in found.values())
                    bar.update()
                    if bar.disable:
                        print(f"{ran}: {len(found)} texts, {len(wrong)} wrong so far", file=sys.stderr, flush=True)
                rows.append(row)
    return {"prompts": len(prompts), "most_bytes": most, "wrong": len(wrong), "rows": rows}, wrong


def requests(prompts: Sequence[bytes], grammar: Grammar, most: int, how: dict[str, Any]) -> list[Request]:
    """Each prompt greedily, then sampled."""
    return [
        Request(
            id=f"{number}, {'sampled' if temperature else 'greedy'}",
            prompt_ids=[BOS_ID, *(byte + BYTE_OFFSET for byte in prompt)],
            max_tokens=most,
            sampling=SamplingParams(temperature=temperature, seed=number),
            grammar=grammar.text,
            **how,
        )
        for number, prompt in enumerate(prompts)
        for temperature in (0.0, 1.0)
    ]


def answers(engine: Engine, requests: Sequence[Request]) -> dict[str, Answer]:
    """By the requests' ids."""
    for request in requests:
        engine.add(request)
    texts, found = {request.id: b"" for request in requests}, dict[str, Answer]()
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, Failed):
                raise RuntimeError(f"{event.id}: {event.message}")
            texts[event.id] += event.text
            if isinstance(event, Finished):
                found[event.id] = Answer(texts[event.id], event.reason, event.usage.decoder_calls)
    return found


def faults(
    ran: str, prompts: Sequence[bytes], grammar: Grammar, wanted: Mapping[str, Answer], found: Mapping[str, Answer]
) -> Iterator[str]:
    """A line about every text that is not the wanted one or does not match. ran: what was run."""
    for name, right in wanted.items():
        text, reason, _ = found[name]
        if (text, reason) != right[:2]:
            fault: str | None = f"not blt's {right.text!r}, which ended with {right.reason!r}"
        elif reason not in ("stop", "length"):
            fault = f"it ended with {reason!r}"
        else:
            fault = grammar.fault(text, is_whole=reason == "stop")
        if fault:
            prompt = prompts[int(name.partition(",")[0])]
            yield f"{ran}, prompt {name}, {prompt!r}: {text!r}: {fault}"


@contextmanager
def forced_bytes(are_taken: bool) -> Iterator[None]:
    """Whether bytes that a grammar forces become drafts."""
    if are_taken:
        yield
    else:
        with patch.object(Constraint, "forced", lambda *_: []):
            yield


def render(content: Content) -> str:
    """A column per decoder."""
    rows = content["rows"]
    ways = list(dict.fromkeys(row["decoder"] for row in rows))
    lines = []
    for grammar in dict.fromkeys(row["grammar"] for row in rows):
        same = [row for row in rows if row["grammar"] == grammar]
        cells = [f"{row['calls'] / row['bytes']:.2f} ({row['calls_without'] / row['bytes']:.2f})" for row in same]
        lines.append([grammar, *(f"{same[0][count]:,}" for count in COUNTS), *cells])
    cut = f"texts were cut after {content['most_bytes']} bytes"
    asked = f"{content['prompts']} prompts were answered greedily and sampled; {cut}."
    json = ", ".join(f"{taken:.2f} ({without:.2f}) for {way}" for way, (taken, without) in _json(rows).items())
    said = f"Decoder calls a byte; in parentheses without forced bytes as drafts. For all JSON: {json}."
    return f"{asked} {said}\n\n{report.table(['grammar', *COUNTS, *ways], lines)}"


def judge(content: Content) -> list[Verdict]:
    rows, wrong = content["rows"], content["wrong"]
    total, calls = 2 * sum(row["texts"] for row in rows), _json(rows)
    saved = {way: a / b for way, (a, b) in calls.items()}
    least = max(saved, key=lambda way: saved[way])
    found = f"{calls[least][0]:.2f} instead of {calls[least][1]:.2f} for {least}, which saves the least"
    return [
        Verdict(
            "constrained texts",
            "blt's without drafts, and what another library matches",
            f"{wrong} of {total:,} are wrong",
            not wrong,
        ),
        Verdict("decoder calls a byte of JSON", "fewer with forced bytes than without", found, max(saved.values()) < 1),
    ]


def _json(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Decoder calls a byte of all JSON, with forced bytes and without, for each decoder."""
    sums: dict[str, dict[str, int]] = {}
    for row in rows:
        if row["is_json"]:
            of = sums.setdefault(row["decoder"], dict.fromkeys(("calls", "calls_without", "bytes"), 0))
            for name in of:
                of[name] += row[name]
    return {way: (of["calls"] / of["bytes"], of["calls_without"] / of["bytes"]) for way, of in sums.items()}


if __name__ == "__main__":
    sys.exit(main())
