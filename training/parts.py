"""Splits a file into parts of at most 15 MiB, listed in a manifest, for transfers with that limit.

A part is named after its content, and the manifest is replaced atomically once all its parts exist. So if a write is
interrupted, the folder still holds the old content or the new; other parts are removed by the next write.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

PART_BYTES = 15 << 20


@dataclass(frozen=True, slots=True)
class Part:
    """A file next to the manifest: its size, and the SHA-256 of its content in hexadecimal."""

    file: str
    bytes: int
    sha256: str


class PartError(ValueError):
    """A part is missing or damaged."""


def write_parts(folder: Path, data: bytes, most: int = PART_BYTES) -> list[Part]:
    """Writes `data` as files state-NUMBER-DIGEST.part of at most `most` bytes into `folder`."""
    parts = []
    for number, start in enumerate(range(0, len(data), most), 1):
        piece = data[start : start + most]
        digest = sha256(piece).hexdigest()
        parts.append(Part(f"state-{number}-{digest[:12]}.part", len(piece), digest))
        write_whole(folder / parts[-1].file, piece)
    return parts


def read_parts(folder: Path, parts: Sequence[Part]) -> bytes:
    """The data that `write_parts` wrote. Raises PartError."""
    pieces = []
    for part in parts:
        path = folder / part.file
        if Path(part.file).name != part.file:
            raise PartError(f"{part.file}: a part must lie in the folder of its manifest")
        if not path.is_file():
            raise PartError(f"{path} is missing: copy it there, it has {part.bytes} bytes")
        pieces.append(path.read_bytes())
        if len(pieces[-1]) != part.bytes:
            raise PartError(f"{path} has {len(pieces[-1])} bytes instead of {part.bytes}: copy it again")
        if sha256(pieces[-1]).hexdigest() != part.sha256:
            raise PartError(f"{path} is damaged, its SHA-256 is not the manifest's: copy it again")
    return b"".join(pieces)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file at once or not at all, so that even a power cut leaves the old or the new content."""
    unfinished = path.with_name(path.name + ".new")
    with unfinished.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def remove_others(folder: Path, parts: Sequence[Part]) -> None:
    """Deletes the parts that are not among `parts`, including incomplete ones."""
    kept = {part.file for part in parts}
    for path in folder.glob("state-*.part*"):
        if path.name not in kept:
            path.unlink()
