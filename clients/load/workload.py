"""What is asked: prompts, lengths and decoders, drawn from one seed."""

import json
import math
import random
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

DEFAULT_BYTES = 256
"""Of a prompt that is cut from a text."""
DEFAULT_TEXT = 1 << 22
"""Bytes of Python's standard library that prompts are cut from if no file is named."""


class Range(NamedTuple):
    """A length in bytes, drawn evenly from least to most."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """'100' or '50-200'. Raises ValueError."""
        least, dash, most = text.partition("-")
        try:
            found = cls(int(least), int(most if dash else least))
        except ValueError:
            found = cls(0, 0)
        if not 1 <= found.least <= found.most:
            raise ValueError(f"must be a length such as 100 or a range such as 50-200, from 1 on, not {text!r}")
        return found

    def draw(self, draw: random.Random) -> int:
        return draw.randint(self.least, self.most)

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least}-{self.most}"


def parse_numbers(text: str) -> list[float]:
    """'1,2.5,10': positive numbers. Raises ValueError."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < math.inf for number in numbers):
        raise ValueError(f"must be a positive number, or several as in 1,2,4, not {text!r}")
    return numbers


def parse_weights(text: str) -> dict[str, float]:
    """'blt:2,blt-d:1': weights by decoder; a decoder alone has the weight 1. Raises ValueError."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, colon, weight = part.strip().partition(":")
        try:
            number = float(weight) if colon else 1.0
        except ValueError:
            number = -1.0
        if not name or name in weights or not 0 < number < math.inf:
            raise ValueError(f"must be decoders with positive weights, as in blt:2,blt-d:1, not {text!r}")
        weights[name] = number
    return weights


class Asked(NamedTuple):
    """A request. decoder: None leaves the choice to the server."""

    decoder: str | None
    body: dict[str, Any]


class Texts:
    """Prompts cut from texts at places drawn by chance, or given whole in JSONL files and taken in their order."""

    def __init__(self, files: Sequence[Path], lengths: Range | None) -> None:
        """Raises ValueError for a file without prompts, OSError."""
        self._lengths = lengths
        self._text = b""
        self._given: list[Any] = []
        self._next = 0
        for path in files or _standard_library():
            if path.suffix == ".jsonl":
                self._given += _prompts(path)
            elif files or len(self._text) < DEFAULT_TEXT:
                self._text += path.read_bytes()
        if not self._given and not self._text:
            raise ValueError(f"no prompts in {', '.join(map(str, files))}")

    def draw(self, draw: random.Random) -> Any:
        """A string, or the ids that a JSONL file gives. Texts take turns with given prompts, evenly by chance."""
        if self._given and (not self._text or draw.random() < 0.5):
            prompt = self._given[self._next % len(self._given)]
            self._next += 1
            return prompt if self._lengths is None else _cut(prompt, self._lengths.draw(draw))
        length = (self._lengths or Range(DEFAULT_BYTES, DEFAULT_BYTES)).draw(draw)
        start = draw.randrange(max(1, len(self._text) - length + 1))
        return _cut_bytes(self._text[start : start + length], length)


class Workload:
    """Requests without end; the same seed gives the same ones."""

    def __init__(
        self,
        texts: Texts,
        max_tokens: Range,
        decoders: Mapping[str, float],
        fields: Mapping[str, Any],
        seed: int,
    ) -> None:
        """fields: of every body. decoders: weights, or none."""
        self._texts, self._max_tokens = texts, max_tokens
        self._names, self._weights = list(decoders), list(decoders.values())
        self._fields = dict(fields)
        self._draw = random.Random(seed)

    def __iter__(self) -> Iterator[Asked]:
        return self

    def __next__(self) -> Asked:
        draw = self._draw
        body: dict[str, Any] = {"prompt": self._texts.draw(draw), "max_tokens": self._max_tokens.draw(draw)}
        if self._fields.get("temperature") != 0:
            body["seed"] = draw.getrandbits(31)
        decoder = draw.choices(self._names, self._weights)[0] if self._names else None
        if decoder is not None:
            body["decoder"] = decoder
        streamed = {"stream": True, "stream_options": {"include_usage": True}}
        return Asked(decoder, {**body, **self._fields, **streamed})


def _standard_library() -> list[Path]:
    return sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))


def _prompts(path: Path) -> list[Any]:
    prompts = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, LookupError, TypeError):
            raise ValueError(f"{path}: line {number} must be an object with the field prompt") from None
        if not prompt or not isinstance(prompt, str | list):
            raise ValueError(f"{path}: line {number}: prompt must be a text or a list of ids, and not empty")
        prompts.append(prompt)
    return prompts


def _cut(prompt: Any, length: int) -> Any:
    return _cut_bytes(prompt.encode(), length) if isinstance(prompt, str) else prompt[:length]


def _cut_bytes(data: bytes, length: int) -> str:
    """Of characters that are cut through, or are no UTF-8, nothing is left."""
    return data[:length].decode(errors="ignore")
