"""The corpus: the standard library of the running Python.

A document is one `.py` file: BOS, its bytes, EOS. One file in twenty, chosen by a hash of its name, is held out.

`python -m training.corpus --out corpus.tar.xz` writes it to an archive of about 5 MB, for a run that continues under
another Python: a run keeps its text.
"""

import argparse
import io
import lzma
import platform
import sys
import sysconfig
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.config import BOS_ID, BYTE_OFFSET, EOS_ID, PAD_ID

HELD_OUT_ONE_IN = 20
START_WEIGHT = 64
"""The start of a document is drawn as often as this many places inside it."""


@dataclass(frozen=True)
class Corpus:
    """Documents as byte strings, with their names relative to the library's root, sorted by name.

    python: the version of CPython whose library they are.
    """

    names: tuple[str, ...]
    texts: tuple[bytes, ...]
    python: str = field(default_factory=platform.python_version)

    @property
    def num_bytes(self) -> int:
        return sum(map(len, self.texts))

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of all names and texts, in hexadecimal."""
        found = sha256()
        for name, text in zip(self.names, self.texts, strict=True):
            found.update(f"{name}\0{len(text)}\0".encode() + text)
        return found.hexdigest()

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

        A document is drawn in proportion to its length, the slice's start uniformly. Every row is a separate text, like
        a prompt when served, so documents never see each other.
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
        """Every document cut into rows of `length` + 1 ids, (rows, length + 1): each id but BOS occurs exactly once."""
        pieces = [ids[i : i + length] for ids in self._encoded for i in range(0, len(ids), length)]
        rows = np.full((len(pieces), length + 1), PAD_ID, dtype=np.int64)
        rows[:, 0] = BOS_ID
        for row, piece in zip(rows, pieces, strict=True):
            row[1 : 1 + len(piece)] = piece
        return torch.from_numpy(rows)


def standard_library(root: Path | None = None) -> tuple[Corpus, Corpus]:
    """(training, held-out) documents: every `.py` file below `root` that is UTF-8, installed packages left out."""
    root = root or Path(sysconfig.get_path("stdlib"))
    found = _split(_files(root), platform.python_version())
    if not found[0].names:
        raise FileNotFoundError(f"no Python files below {root}")
    return found


def write_archive(path: Path, root: Path | None = None) -> int:
    """Writes the files of `standard_library(root)` into a .tar.xz, the same bytes each time; returns their number."""
    found = standard_library(root)
    documents = sorted(pair for corpus in found for pair in zip(corpus.names, corpus.texts, strict=True))
    with tarfile.open(path, "w:xz", format=tarfile.PAX_FORMAT) as archive:
        for name, text in documents:
            member = tarfile.TarInfo(f"cpython-{found[0].python}/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    return len(documents)


def read_archive(path: Path) -> tuple[Corpus, Corpus]:
    """(training, held-out) documents of an archive by `write_archive`. Raises ValueError for any other file."""
    versions: set[str] = set()

    def documents() -> Iterator[tuple[str, bytes]]:
        with tarfile.open(path, "r:xz") as archive:
            for member in archive:
                folder, _, name = member.name.partition("/")
                file = archive.extractfile(member)
                if file is None or not name or not folder.startswith("cpython-"):
                    raise ValueError(f"{path}: {member.name} is not in a folder cpython-VERSION")
                versions.add(folder.removeprefix("cpython-"))
                yield name, file.read()

    try:
        found = list(documents())
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path} is not an archive of `python -m training.corpus`: {error}") from None
    if len(versions) != 1:
        raise ValueError(f"{path} holds {len(versions)} folders cpython-VERSION instead of one")
    return _split(found, versions.pop())


def corpora(path: Path | None) -> tuple[Corpus, Corpus]:
    """(training, held-out) documents of an archive, or of the standard library. Raises OSError or ValueError."""
    return read_archive(path) if path else standard_library()


def _files(root: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "site-packages" in name or "dist-packages" in name:
            continue
        text = path.read_bytes()
        try:
            text.decode()
        except UnicodeDecodeError:
            continue
        yield name, text


def _split(documents: Iterable[tuple[str, bytes]], python: str) -> tuple[Corpus, Corpus]:
    training: dict[str, bytes] = {}
    held_out: dict[str, bytes] = {}
    for name, text in sorted(documents):
        (held_out if zlib.crc32(name.encode()) % HELD_OUT_ONE_IN == 0 else training)[name] = text
    return (
        Corpus(tuple(training), tuple(training.values()), python),
        Corpus(tuple(held_out), tuple(held_out.values()), python),
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.corpus", description="Writes Python's standard library as an archive to train on."
    )
    parser.add_argument("--out", type=Path, required=True, help="the archive, a .tar.xz")
    options = parser.parse_args(arguments)
    count = write_archive(options.out)
    print(f"{options.out}: {count} files of CPython {platform.python_version()}, {options.out.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
