"""What the simulated model says: a text that depends on prompt, seed and place alone, and what a request should get."""

import random
import struct
import zlib
from functools import lru_cache
from typing import NamedTuple

from engine.config import BYTE_OFFSET, EOS_ID, is_byte, text_of
from engine.types import MAX_DRAFT, FinishReason, Request

EOS_SHARE, WRONG_SHARE = 0.01, 0.2
PATCH = 4
"""Bytes of a patch, on average."""


@lru_cache(maxsize=1 << 14)
def _text(key: bytes, count: int) -> tuple[int, ...]:
    draw = random.Random(key)
    return tuple(EOS_ID if draw.random() < EOS_SHARE else BYTE_OFFSET + draw.randrange(256) for _ in range(count))


def output_of(request: Request) -> tuple[int, ...]:
    """The ids that the model generates, and some more."""
    prompt = zlib.crc32(struct.pack(f"{len(request.prompt_ids)}H", *request.prompt_ids))
    key = struct.pack("IQI", prompt, request.sampling.seed, request.sample_index)
    return _text(key, request.max_tokens + MAX_DRAFT + 1)


def guess_of(request: Request, place: int) -> int:
    """A draft of the id at a place of the output: often the model's own."""
    own = output_of(request)[place]
    wrong = zlib.crc32(struct.pack("II", place, own)) % 100 < 100 * WRONG_SHARE
    return BYTE_OFFSET + (own + 1) % 256 if wrong else own


def starts_patch(place: int, longest: int) -> bool:
    return zlib.crc32(struct.pack("I", place)) % PATCH == 0 or place % longest == 0


class Expected(NamedTuple):
    ids: tuple[int, ...]
    text: bytes
    reason: FinishReason


def expected(request: Request) -> Expected:
    """What a client must get, read off the whole text."""
    ids = output_of(request)
    for count in range(1, request.max_tokens + 1):
        text = text_of(ids[:count])
        found = [at for stop in request.stop if (at := text.find(stop)) >= 0]
        if found and is_byte(ids[count - 1]):
            return Expected(ids[:count], text[: min(found)], "stop")
        if ids[count - 1] == EOS_ID:
            return Expected(ids[:count], text, "stop")
    return Expected(ids[: request.max_tokens], text_of(ids[: request.max_tokens]), "length")
