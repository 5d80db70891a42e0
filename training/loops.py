"""How many of a model's greedy texts end in a loop, as small models' do."""

import random
from pathlib import Path

from engine.config import BOS_ID, BYTE_OFFSET, DeviceName, EngineConfig, WeightsName
from engine.engine import Engine
from engine.types import Delta, Failed, Finished, Request, SamplingParams

from .corpus import Corpus

PROMPT_BYTES = 200
TEXT_BYTES = 200
PROMPTS = 100
LEAST_TIMES = 3
LEAST_BYTES = 30


def ends_in_a_loop(text: bytes) -> bool:
    """Whether `text` ends with something of any length at least `LEAST_TIMES` times in a row, the last time perhaps cut
    off, over `LEAST_BYTES` bytes or more. A line of dashes is a loop, too."""
    for period in range(1, len(text) // LEAST_TIMES + 1):
        least = max(LEAST_BYTES, LEAST_TIMES * period)
        if least <= len(text) and text[-least:-period] == text[-least + period :]:
            return True
    return False


def prompts(corpus: Corpus, count: int = PROMPTS) -> list[bytes]:
    """`count` random slices of documents, the same ones each time. Short documents are used only if all are short."""
    draw = random.Random(0)
    texts = [text for text in corpus.texts if len(text) > PROMPT_BYTES] or corpus.texts
    found = []
    for _ in range(count):
        text = draw.choice(texts)
        start = draw.randrange(max(1, len(text) - PROMPT_BYTES))
        found.append(text[start : start + PROMPT_BYTES])
    return found


def generate(
    path: Path,
    prompts: list[bytes],
    count: int,
    temperature: float,
    weights: WeightsName | None = None,
    device: DeviceName = "cpu",
) -> list[bytes]:
    """The engine's continuation of each prompt, all in one batch, with seed 0: `count` bytes or up to EOS."""
    engine = Engine(EngineConfig(model=str(path), cache_bytes=512 << 20, weights=weights, device=device))
    texts = {str(i): b"" for i in range(len(prompts))}
    for i, prompt in enumerate(prompts):
        ids = [BOS_ID, *(byte + BYTE_OFFSET for byte in prompt)]
        engine.add(
            Request(id=str(i), prompt_ids=ids, max_tokens=count, sampling=SamplingParams(temperature=temperature))
        )
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, Failed):
                raise RuntimeError(event)
            if isinstance(event, Delta | Finished):
                texts[event.id] += event.text
    return list(texts.values())


def looping(path: Path, corpus: Corpus, weights: WeightsName | None = None, device: DeviceName = "cpu") -> float:
    """Share of the greedy texts of `TEXT_BYTES` bytes after `prompts` that end in a loop. weights, device: the
    engine's."""
    texts = generate(path, prompts(corpus), TEXT_BYTES, 0, weights, device)
    return sum(map(ends_in_a_loop, texts)) / len(texts)
