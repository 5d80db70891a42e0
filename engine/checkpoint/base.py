"""The result of reading a checkpoint: the checkpoint, or this package's only error."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from ..config import ModelConfig

Format = Literal["fastblt", "hf", "meta"]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written. One line that names the file and what is wrong in it."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    r"""With escapes (`\n`, `\x1b`) for unprintable characters: names and values come from files of unknown origin."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model in memory. `tensors` are mapped from `files`, in their dtypes, under the names of `expected_shapes`; they
    must not be written to. `notes`: what the user should know about how the files were understood, a sentence each."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    format: Format
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
