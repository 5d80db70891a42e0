"""Reads files as a model does: slice by slice, each a separate text that begins with BOS.

Files may hold any bytes. A file is read in pieces; at most one slice of it is held.
"""

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from engine.config import BOS_ID, BYTE_OFFSET

CONTEXT = 1024
"""Default bytes per slice."""
STDIN = "-"


@dataclass(frozen=True, slots=True)
class Slice:
    """Bytes of one file, the first `num_known` of which were in the slice before and only serve as context."""

    file: int
    """Index into `Texts.paths`."""
    data: bytes
    num_known: int = 0

    @property
    def ids(self) -> list[int]:
        return [BOS_ID, *(byte + BYTE_OFFSET for byte in self.data)]

    @property
    def num_new(self) -> int:
        return len(self.data) - self.num_known

    @property
    def new(self) -> bytes:
        return self.data[self.num_known :]


@dataclass(frozen=True, slots=True)
class Texts:
    """Files, cut into slices of up to `context` bytes that begin `stride` bytes apart, so that every byte is new in
    exactly one. max_bytes: most bytes to read from all files together; None reads all."""

    paths: tuple[Path, ...]
    context: int
    stride: int
    max_bytes: int | None = None

    def check(self) -> int | None:
        """Number of bytes to read; None for a pipe, whose length is unknown.

        Raises ValueError for a file that is empty or a directory, OSError for one that is not there.
        """
        if self.context < 1:
            raise ValueError(f"--context: {self.context} must be 1 or more")
        if not 1 <= self.stride <= self.context:
            raise ValueError(f"--stride: {self.stride} must be from 1 to --context, which is {self.context}")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ValueError(f"--max-bytes: {self.max_bytes} must be 1 or more")
        total: int | None = 0
        for path in self.paths:
            if path.is_dir():
                raise ValueError(f"{path}: this is a directory; name its files")
            if str(path) == STDIN or (path.exists() and not path.is_file()):
                total = None
                continue
            with _open(path):
                size = path.stat().st_size
            if not size:
                raise ValueError(f"{path}: the file is empty")
            total = None if total is None else total + size
        return self.max_bytes if total is None else min(total, self.max_bytes or total)

    def __iter__(self) -> Iterator[Slice]:
        """Raises OSError, and ValueError for a file that turns out to be empty."""
        left = self.max_bytes
        for file, path in enumerate(self.paths):
            if left == 0:
                return
            with _open(path) as source:
                data = b""
                while new := _read(source, self.stride if data else self.context, left):
                    left = None if left is None else left - len(new)
                    known = data[self.stride :]
                    data = known + new
                    yield Slice(file, data, len(known))
            if not data:
                raise ValueError(f"{path}: the file is empty")


def check_context(context: int, max_length: int) -> None:
    """Raises ValueError if a slice and its BOS exceed `max_length` ids."""
    if context >= max_length:
        raise ValueError(
            f"--context: {context} bytes and BOS make {context + 1} ids; this model and its caches hold {max_length}"
        )


def _open(path: Path) -> BinaryIO | nullcontext[BinaryIO]:
    return nullcontext(sys.stdin.buffer) if str(path) == STDIN else path.open("rb")


def _read(source: BinaryIO, count: int, left: int | None) -> bytes:
    """`count` bytes, fewer at the end or from a pipe."""
    count = count if left is None else min(count, left)
    data = b""
    while len(data) < count and (piece := source.read(count - len(data))):
        data += piece
    return data
