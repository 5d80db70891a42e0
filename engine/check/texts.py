"""Texts of the exact decoders, which must equal blt's, and of other kernels."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..config import BOS_ID, BYTE_OFFSET
from ..decoders import DECODERS
from ..engine import Engine
from ..types import Delta, Failed, Request, SamplingParams

PROMPTS = (
    b"def fibonacci(n: int) -> int:\n    ",
    b"The quick brown fox jumps over the lazy dog. ",
    b'{"name": "Ada", "born": 1815, "works": [',
    "Gr\u00f6\u00dfe und Ma\u00df: \u65e5\u672c\u8a9e, na\u00efve ".encode(),
)
NEW_BYTES = 64
Texts = dict[str, list[int]]
"""Generated ids by the name of their request."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Texts that must be equal. compared: ids that were. wrong: the first difference of each text that differs."""

    dtype: str
    what: str
    texts: int
    compared: int
    wrong: list[str]


def requests(decoder: str) -> dict[str, Request]:
    """Each prompt greedily and sampled, by names that do not depend on the decoder."""
    named = {}
    for number, prompt in enumerate(PROMPTS):
        for way, temperature in (("greedy", 0.0), ("sampled", 0.8)):
            fields: dict[str, Any] = {"decoder": decoder, "max_tokens": NEW_BYTES, "ignore_eos": True}
            sampling = SamplingParams(temperature=temperature, seed=number)
            ids = [BOS_ID, *(byte + BYTE_OFFSET for byte in prompt)]
            name = f"prompt {number + 1}, {way}"
            named[name] = Request(id=f"{decoder}: {name}", prompt_ids=ids, sampling=sampling, **fields)
    return named


def exact(engine: Engine) -> list[str]:
    """The decoders of the model whose texts are blt's."""
    return [name for name in engine.limits.decoders if DECODERS[name].exact]


def generate(engine: Engine, batch: Iterable[Request], deadline: float) -> Texts:
    """The ids of all requests in one batch, as far as they come before the deadline (`time.monotonic`). Raises
    RuntimeError if one fails."""
    texts: Texts = {}
    for request in batch:
        texts[request.id] = []
        engine.add(request)
    while engine.has_work and time.monotonic() < deadline:
        for event in engine.step():
            if isinstance(event, Failed):
                raise RuntimeError(f"{event.id}: {event.message}")
            if isinstance(event, Delta):
                texts[event.id] += event.ids
    stop(engine, texts)
    return texts


def stop(engine: Engine, names: Iterable[str]) -> None:
    """Aborts what still runs, and leaves the engine idle."""
    for name in names:
        engine.abort(name)
    while engine.has_work:
        engine.step()


def of_blt(engine: Engine, deadline: float) -> Texts:
    """What blt writes after each prompt, each alone in the engine."""
    texts: Texts = {}
    for name, request in requests("blt").items():
        texts[name] = generate(engine, [request], deadline)[request.id]
    return texts


def of_decoders(engine: Engine, decoders: Iterable[str], deadline: float) -> dict[str, Texts]:
    """What these decoders write, all in one batch."""
    named = {decoder: requests(decoder) for decoder in decoders}
    found = generate(engine, [request for by_name in named.values() for request in by_name.values()], deadline)
    return {
        decoder: {name: found[request.id] for name, request in by_name.items()} for decoder, by_name in named.items()
    }


def compare(dtype: str, what: str, found: Mapping[str, list[int]], expected: Mapping[str, list[int]]) -> Comparison:
    """As many ids of each text as both have."""
    compared, wrong = 0, []
    for name, ids in found.items():
        length = min(len(ids), len(expected[name]))
        compared += length
        if (at := next((i for i in range(length) if ids[i] != expected[name][i]), None)) is not None:
            wrong.append(
                f"{what}, {dtype}: {name}: byte {at} is {_shown(ids[at])} and should be {_shown(expected[name][at])}"
            )
    return Comparison(dtype, what, len(found), compared, wrong)


def _shown(token: int) -> str:
    return repr(bytes([token - BYTE_OFFSET])) if BYTE_OFFSET <= token < BYTE_OFFSET + 256 else f"id {token}"
