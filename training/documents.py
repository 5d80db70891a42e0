"""Files of text to learn from, read a row at a time: of large files only the rows asked for are in memory.

A document is a whole file or, in a `.jsonl` or `.ndjson` file, the text in one field of a line. It is read as BOS, its
bytes, EOS.

What is held out is never drawn for training: of files of at least `LARGE` bytes the last twentieth, but no more than
`MOST_HELD_OUT`; of smaller ones one in twenty, whole, by a hash of its bytes. Or files of their own, if the user
names them.
"""

import json
import mmap
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from engine.config import BOS_ID, BYTE_OFFSET, EOS_ID, PAD_ID

from .corpus import HELD_OUT_ONE_IN, START_WEIGHT

LARGE = 64 << 10
MOST_HELD_OUT = 1 << 20
LEAST_HELD_OUT = 4 << 10
"""Fewer bytes give no figure worth printing."""
LEAST_TEXT = 1 << 10
"""A shorter piece of a file is too little context to measure on."""
LINES = (".jsonl", ".ndjson")
"""Ends of the names of line files, in small or capital letters."""
COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".lz4", ".zip")
EMPTY_DRAWS = 1000
"""So many lines in a row without text mean that there is none."""


@lru_cache(maxsize=256)
def _contents(path: Path, modified: int) -> mmap.mmap | bytes:
    """Of a file. A mapping keeps a file descriptor, of which a process may have too few for thousands of files: so
    small files are read, and mappings that have not been used for long are closed. `modified` tells other contents."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < LARGE:
            return file.read()
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@dataclass(frozen=True)
class Part:
    """The bytes from `begin` to `end` of a file. modified: when, in nanoseconds. field: of the objects in its lines;
    None if the file is a document."""

    path: Path
    modified: int
    begin: int
    end: int
    field: str | None

    @property
    def size(self) -> int:
        return self.end - self.begin

    @property
    def _data(self) -> mmap.mmap | bytes:
        return _contents(self.path, self.modified)

    def piece(self, draw: np.random.Generator, place: int, length: int) -> np.ndarray:
        """Up to `length` ids of the document at byte `place` of the part: a slice from a random start."""
        if self.field is None:
            ends = self.end == len(self._data)
            start = max(0, int(draw.integers(-START_WEIGHT, max(1, self.size + ends - length + 1))))
            data = self._data[self.begin + start : min(self.begin + start + length, self.end)]
            return _ids(data, closed=ends and len(data) < length)
        ids = _ids(self._line(self.begin + place)[0], closed=True)
        start = max(0, int(draw.integers(-START_WEIGHT, max(1, len(ids) - length + 1))))
        return ids[start : start + length] if len(ids) > 1 else ids[:0]

    def texts(self, most: int) -> Iterator[bytes]:
        """The first texts, of `most` bytes in all, one after another; a file's part is one text. Reads no more."""
        if self.field is None:
            if size := min(most, self.size):
                yield self._data[self.begin : self.begin + size]
            return
        place = self.begin
        while place < self.end and most > 0:
            text, place = self._line(place)
            if text:
                yield text[:most]
                most -= len(text)

    def check(self, read: Callable[[int], object]) -> None:
        """Reads every line, and tells `read` how many bytes that were. Raises ValueError for a line that is no object
        with the field."""
        if self.field is None:
            return
        place = self.begin
        while place < self.end:
            before = place
            _, place = self._line(place)
            read(place - before)

    def _line(self, place: int) -> tuple[bytes, int]:
        """The text of the line at byte `place`, and where the next one begins. Raises ValueError for a line that is no
        object with the field."""
        assert self.field is not None
        begin = self._data.rfind(b"\n", 0, place) + 1
        end = self._data.find(b"\n", place)
        end = len(self._data) if end < 0 else end
        line = self._data[begin:end].strip()
        if not line:
            return b"", end + 1
        where = f"{self.path}: the line at byte {begin}"
        try:
            found = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}") from None
        if not isinstance(found, dict) or not isinstance(text := found.get(self.field), str):
            raise ValueError(f"{where} has no text in a field {self.field!r}: name the field with --field")
        return text.encode("utf-8", "surrogatepass"), end + 1


@dataclass(frozen=True)
class Documents:
    """Parts of files, as texts to draw from or to read in order."""

    parts: tuple[Part, ...]

    @cached_property
    def num_bytes(self) -> int:
        return sum(part.size for part in self.parts)

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([part.size for part in self.parts])

    @cached_property
    def digest(self) -> str:
        """Tells other files or other parts of them, by their names, places, and first and last bytes."""
        found = sha256()
        for part in self.parts:
            found.update(f"{part.path.name}\0{part.begin}\0{part.end}\0{part.field}\0".encode())
            found.update(part._data[part.begin : part.begin + LARGE] + part._data[max(0, part.end - LARGE) : part.end])
        return found.hexdigest()

    def rows(self, draw: np.random.Generator, count: int, length: int) -> Tensor:
        """`count` random rows of `length` + 1 ids, int64 (count, length + 1): BOS, a slice of one document, padding.

        As `Corpus.rows`: a document is drawn in proportion to its length. Raises ValueError for a broken line, and if
        no line has text.
        """
        rows = np.full((count, length + 1), PAD_ID, dtype=np.int64)
        rows[:, 0] = BOS_ID
        for row in rows:
            for _ in range(EMPTY_DRAWS):
                at = int(draw.integers(self.num_bytes))
                part = int(np.searchsorted(self._ends, at, side="right"))
                place = at - int(self._ends[part]) + self.parts[part].size
                piece = self.parts[part].piece(draw, place, length)
                if len(piece):
                    break
            else:
                raise ValueError(f"{self.parts[0].path}: the lines have no text")
            row[1 : 1 + len(piece)] = piece
        return torch.from_numpy(rows)

    def texts(self, most: int) -> list[bytes]:
        """The first texts of every part, of at most `most` bytes in all: each part's share is in proportion to its
        size. A share of fewer than `LEAST_TEXT` bytes is left to the next part, unless it is all of its part or there
        is none."""
        most, found = min(most, self.num_bytes), list[bytes]()
        given = 0
        for part, end in zip(self.parts, self._ends.tolist(), strict=True):
            due = most * end // self.num_bytes - given
            if due >= min(LEAST_TEXT, part.size) or part is self.parts[-1]:
                texts = list(part.texts(due))
                given += sum(map(len, texts))
                found += texts
        return found


def check_lines(*given: Documents) -> None:
    """Reads all lines of line files once, with a progress bar on a terminal, so that a run does not come upon a broken
    one after hours. Raises ValueError for a line that is no object with the field."""
    parts = [part for documents in given for part in documents.parts if part.field is not None]
    size = sum(part.size for part in parts)
    with tqdm(total=size, desc="checking", unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        for part in parts:
            part.check(bar.update)


def slices(texts: Sequence[bytes], length: int) -> Tensor:
    """Texts cut into rows of `length` + 1 ids, (rows, length + 1): BOS, up to `length` bytes, padding; no EOS."""
    pieces = [text[i : i + length] for text in texts for i in range(0, len(text), length)]
    rows = np.full((len(pieces), length + 1), PAD_ID, dtype=np.int64)
    rows[:, 0] = BOS_ID
    for row, piece in zip(rows, pieces, strict=True):
        row[1 : 1 + len(piece)] = _ids(piece)
    return torch.from_numpy(rows)


def open_documents(files: Sequence[Path], held_out: Sequence[Path], field: str) -> tuple[Documents, Documents]:
    """(training, held-out) documents of files. held_out: files that are all held out; without them it is a part of
    `files`. Raises OSError for a file that cannot be read, and ValueError for one that is compressed, if all are
    empty, or for too little text."""
    wholes = _wholes(files, field)
    if held_out:
        apart = _wholes(held_out, field)
        digests = _digests([*wholes, *apart])
        learnt = dict(zip(digests, wholes, strict=False))
        for part, digest in zip(apart, digests[len(wholes) :], strict=True):
            if other := learnt.get(digest):
                raise ValueError(
                    f"{part.path} cannot be both learnt from and held out: it has the bytes of {other.path}"
                )
        training, kept = Documents(tuple(wholes)), Documents(tuple(apart))
    else:
        pairs = [_divided(part) for part in wholes]
        training, kept = (Documents(tuple(p for p in parts if p.size)) for parts in zip(*pairs, strict=True))
    if not training.num_bytes or kept.num_bytes < LEAST_HELD_OUT:
        raise ValueError(
            f"too little text: {training.num_bytes:,} bytes to learn from and {kept.num_bytes:,} held out, of which at "
            f"least {LEAST_HELD_OUT:,} are needed to measure; give more text, or files with --held-out"
        )
    return training, kept


def _wholes(paths: Sequence[Path], field: str) -> list[Part]:
    """Files without empty ones, and without those that have the bytes of earlier ones, so that nothing held out has a
    copy to learn from."""
    full = [part for part in (_whole(path, field) for path in paths) if part.size]
    if not full:
        raise ValueError(f"{paths[0]}: the file is empty" + (", and so are all others" if len(paths) > 1 else ""))
    found = dict[tuple[int, bytes], Part]()
    for part, digest in zip(full, _digests(full), strict=True):
        found.setdefault(digest, part)
    for count, what in ((len(paths) - len(full), "empty"), (len(full) - len(found), "copies of others")):
        if count:
            print(f"left out: {count} of {len(paths)} files, {what}", file=sys.stderr, flush=True)
    return list(found.values())


def _whole(path: Path, field: str) -> Part:
    if path.is_dir():
        raise ValueError(f"{path}: this is a directory; name its files")
    kind = path.suffix.lower()
    if kind in COMPRESSED:
        raise ValueError(f"{path}: this is compressed; decompress it, and give the file that was in it")
    with path.open("rb"):
        stat = path.stat()
    return Part(path, stat.st_mtime_ns, 0, stat.st_size, field if kind in LINES else None)


def _digests(parts: Sequence[Part]) -> list[tuple[int, bytes]]:
    """Of whole files, for each what only those of the same bytes have: its size and, if others share that, its
    SHA-256."""
    sizes = Counter(part.size for part in parts)
    return [(part.size, sha256(part._data).digest() if sizes[part.size] > 1 else b"") for part in parts]


def _divided(part: Part) -> tuple[Part, Part]:
    """What of a file is for training, and what is held out; one may have no bytes."""
    if part.size < LARGE:
        cut = 0 if zlib.crc32(part._data) % HELD_OUT_ONE_IN == 0 else part.size
    else:
        cut = part.size - min(part.size // HELD_OUT_ONE_IN, MOST_HELD_OUT)
        if part.field is not None:
            cut = part._data.rfind(b"\n", 0, cut) + 1
    return replace(part, end=cut), replace(part, begin=cut)


def _ids(data: bytes, *, closed: bool = False) -> np.ndarray:
    """The ids of some bytes; closed: EOS after them."""
    ids = np.frombuffer(data, np.uint8).astype(np.int64) + BYTE_OFFSET
    return np.append(ids, EOS_ID) if closed else ids
