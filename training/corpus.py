"""The corpus: Python's own standard library, as it lies next to the running interpreter.

A document is one `.py` file: BOS, its bytes, EOS. One file in twenty, chosen by a hash of its name, is held out.
"""

import sysconfig
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.config import BOS_ID, BYTE_OFFSET, EOS_ID, PAD_ID

HELD_OUT_ONE_IN = 20
START_WEIGHT = 64
"""How many places of a document's inside its very start counts for when rows are drawn."""


@dataclass(frozen=True)
class Corpus:
    """Documents as byte strings, with their names relative to the library's root, in the order of the names."""

    names: tuple[str, ...]
    texts: tuple[bytes, ...]

    @property
    def num_bytes(self) -> int:
        return sum(map(len, self.texts))

    @cached_property
    def _encoded(self) -> list[np.ndarray]:
        end = np.array([EOS_ID], dtype=np.int16)
        return [np.concatenate([np.frombuffer(t, np.uint8).astype(np.int16) + BYTE_OFFSET, end]) for t in self.texts]

    @cached_property
    def _shares(self) -> np.ndarray:
        sizes = np.array([len(ids) for ids in self._encoded], dtype=np.float64)
        return np.cumsum(sizes) / sizes.sum()

    def rows(self, draw: np.random.Generator, count: int, length: int) -> Tensor:
        """`count` random rows of `length` + 1 ids, int64 (count, length + 1): BOS, a slice of one document, padding.

        A document is drawn in proportion to its length, the slice's start uniformly. Every row is a text of its own,
        as a prompt is when served, so documents never see each other.
        """
        rows = np.full((count, length + 1), PAD_ID, dtype=np.int64)
        rows[:, 0] = BOS_ID
        for row in rows:
            ids = self._encoded[int(np.searchsorted(self._shares, draw.random(), side="right"))]
            start = max(0, int(draw.integers(-START_WEIGHT, max(1, len(ids) - length + 1))))
            piece = ids[start : start + length]
            row[1 : 1 + len(piece)] = piece
        return torch.from_numpy(rows)

    def slices(self, length: int) -> Tensor:
        """Every document cut into rows of `length` + 1 ids, (rows, length + 1): each id but BOS occurs just once."""
        pieces = [ids[i : i + length] for ids in self._encoded for i in range(0, len(ids), length)]
        rows = np.full((len(pieces), length + 1), PAD_ID, dtype=np.int64)
        rows[:, 0] = BOS_ID
        for row, piece in zip(rows, pieces, strict=True):
            row[1 : 1 + len(piece)] = piece
        return torch.from_numpy(rows)


def standard_library(root: Path | None = None) -> tuple[Corpus, Corpus]:
    """(training, held-out) documents: every `.py` file below `root` that is UTF-8, installed packages left out."""
    root = root or Path(sysconfig.get_path("stdlib"))
    training: dict[str, bytes] = {}
    held_out: dict[str, bytes] = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "site-packages" in name or "dist-packages" in name:
            continue
        text = path.read_bytes()
        try:
            text.decode()
        except UnicodeDecodeError:
            continue
        (held_out if zlib.crc32(name.encode()) % HELD_OUT_ONE_IN == 0 else training)[name] = text
    if not training:
        raise FileNotFoundError(f"no Python files below {root}")
    return (
        Corpus(tuple(training), tuple(training.values())),
        Corpus(tuple(held_out), tuple(held_out.values())),
    )
