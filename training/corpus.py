"""The corpus: the standard library of the running Python, or an archive of it that may hold public packages, too.

A document is one file: BOS, its bytes, EOS. One file in twenty, chosen by a hash of its name, is held out. Of files
with the same contents only the first is a document, so that none is both learnt and held out.

`python -m training.corpus --packages --out corpus.tar.xz` writes an archive. A run keeps its text, and another Python
has another library.
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
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from subprocess import CalledProcessError
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from engine.config import BOS_ID, BYTE_OFFSET, EOS_ID, PAD_ID

from .packages import documents as package_documents
from .packages import download

HELD_OUT_ONE_IN = 20
PYTHON = "cpython-"
START_WEIGHT = 64
"""The start of a document is drawn as often as this many places inside it."""


@dataclass(frozen=True)
class Corpus:
    """Documents as byte strings, sorted by name. Names are relative to the library's root, or begin with a release.

    sources: the releases that they come from, "cpython-VERSION" among them.
    """

    names: tuple[str, ...]
    texts: tuple[bytes, ...]
    sources: tuple[str, ...] = field(default_factory=lambda: (_this_python(),))

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

    def sample(self, most: int) -> "Corpus":
        """Documents of at most `most` bytes together, but at least one, by a hash of their names."""
        pairs = sorted(zip(self.names, self.texts, strict=True), key=lambda pair: zlib.crc32(pair[0][::-1].encode()))
        total = 0
        taken = [pair for pair in pairs if (total := total + len(pair[1])) <= most] or pairs[:1]
        return replace(self, names=tuple(name for name, _ in taken), texts=tuple(text for _, text in taken))

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
    root = root or _library()
    found = _split(_files(root), {_this_python()})
    if not found[0].names:
        raise FileNotFoundError(f"no Python files below {root}")
    return found


def write_archive(path: Path, root: Path | None = None, packages: Iterable[Path] = ()) -> int:
    """Writes the files of `standard_library(root)` and of the packages' source archives into a .tar.xz, the same bytes
    each time; returns their number."""
    this = _this_python()
    documents = [(f"{this}/{name}", text) for name, text in _files(root or _library())]
    documents += [pair for package in packages for pair in package_documents(package)]
    documents = sorted(_different(pair for pair in documents if _is_text(pair[1])))
    with tarfile.open(path, "w:xz", format=tarfile.PAX_FORMAT) as archive:
        for name, text in documents:
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    return len(documents)


def read_archive(path: Path) -> tuple[Corpus, Corpus]:
    """(training, held-out) documents of an archive by `write_archive`. Raises ValueError for any other file."""
    sources: set[str] = set()

    def documents() -> Iterator[tuple[str, bytes]]:
        with tarfile.open(path, "r:xz") as archive:
            for member in archive:
                folder, _, name = member.name.partition("/")
                file = archive.extractfile(member)
                if file is None or not name or "-" not in folder:
                    raise ValueError(f"{path}: {member.name} is not in a folder NAME-VERSION")
                sources.add(folder)
                yield (name if folder.startswith(PYTHON) else member.name), file.read()

    try:
        found = list(documents())
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path} is not an archive of `python -m training.corpus`: {error}") from None
    if (count := sum(source.startswith(PYTHON) for source in sources)) != 1:
        raise ValueError(f"{path} holds {count} folders {PYTHON}VERSION instead of one")
    return _split(found, sources)


def corpora(path: Path | None) -> tuple[Corpus, Corpus]:
    """(training, held-out) documents of an archive, or of the standard library. Raises OSError or ValueError."""
    return read_archive(path) if path else standard_library()


def _this_python() -> str:
    return PYTHON + platform.python_version()


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _files(root: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "site-packages" not in name and "dist-packages" not in name:
            yield name, path.read_bytes()


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _different(documents: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
    """The first document of each content, by name."""
    seen: set[bytes] = set()
    for name, text in sorted(documents):
        if text not in seen:
            seen.add(text)
            yield name, text


def _split(documents: Iterable[tuple[str, bytes]], sources: set[str]) -> tuple[Corpus, Corpus]:
    parts: tuple[dict[str, bytes], dict[str, bytes]] = {}, {}
    for name, text in _different(pair for pair in documents if _is_text(pair[1])):
        parts[zlib.crc32(name.encode()) % HELD_OUT_ONE_IN == 0][name] = text
    training, held_out = (Corpus(tuple(p), tuple(p.values()), tuple(sorted(sources))) for p in parts)
    return training, held_out


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.corpus", description="Writes Python's standard library as an archive to train on."
    )
    more = "add the sources and documentation of the releases in training/packages.txt, which pip downloads (60 MB)"
    parser.add_argument("--packages", action="store_true", help=more)
    parser.add_argument("--out", type=Path, required=True, help="the archive, a .tar.xz")
    options = parser.parse_args(arguments)
    with TemporaryDirectory() as folder:
        try:
            packages = download(Path(folder)) if options.packages else []
        except CalledProcessError as error:
            print(f"pip could not download the packages: exit code {error.returncode}", file=sys.stderr)
            return 1
        count = write_archive(options.out, packages=packages)
    print(f"{options.out}: {count} files, {options.out.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
