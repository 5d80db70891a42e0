"""The result of reading a checkpoint: the checkpoint, or this package's only error."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..config import ModelConfig

Format = Literal["fastblt", "hf", "meta"]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written. One line that names the file and what is wrong in it."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class NotFinite(ValueError):
    """A tensor, by its name, with a number that is NaN or infinite."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        bad = ~tensor.isfinite().flatten()
        place = int(bad.to(torch.uint8).argmax())
        at = [int(index) for index in torch.unravel_index(torch.tensor(place), tensor.shape)]
        others = f", the first of {count:,} numbers that are not finite" if (count := int(bad.sum())) > 1 else ""
        super().__init__(f"holds {tensor[*at].item()} at {at}{others}")
        self.name = name


def require_finite(name: str, tensor: Tensor) -> None:
    """Raises NotFinite. One pass over the tensor and no copy; a NaN is both its least and its greatest number. A tensor
    that has only a shape passes."""
    if not tensor.is_meta and not all(map(isfinite, torch.stack(tensor.aminmax()).tolist())):
        raise NotFinite(name, tensor)


def printable(text: str) -> str:
    r"""With escapes (`\n`, `\x1b`) for unprintable characters: names and values come from files of unknown origin."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model in memory. `tensors` are mapped from `files`, in their dtypes, under the names of `expected_shapes`; they
    must not be written to. `places`: the file of each, and its name there. `notes`: what the user should know about how
    the files were understood, a sentence each."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    format: Format
    files: tuple[Path, ...]
    places: dict[str, str]
    notes: tuple[str, ...] = ()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While tensors are read. Raises CheckpointError with the place of one that is not finite."""
        try:
            yield
        except NotFinite as error:
            raise CheckpointError(f"{self.places[error.name]} {error}") from error
