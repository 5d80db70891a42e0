"""Reading files without reading their contents: tensors are listed with their shapes and mapped into memory.

A mapped tensor's pages come from the file when they are first touched, and can be dropped again: nothing is copied.
"""

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .base import CheckpointError
from .names import Shape

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"

_DTYPES = {"F32", "BF16", "F16", "float32", "bfloat16", "float16"}
_SHOWN = 4
"""Problems that one message lists."""

Validated = TypeVar("Validated", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file. `map` gives it, backed by the file."""

    file: Path
    shape: Shape
    dtype: str
    map: Callable[[], Tensor]


def read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError if it is not there or not a JSON object."""
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path}: {_reason(error)}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {_reason(error)}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def validate(kind: type[Validated], data: object, path: Path, inside: str = "") -> Validated:
    """`data`, found in `path` under the key `inside`, as `kind`. Raises CheckpointError that names field and value."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        problems = []
        for e in error.errors():
            field = ".".join(str(part) for part in ((inside,) if inside else ()) + e["loc"])
            value = "" if e["type"] == "missing" else f" = {str(e['input'])[:60]}" if field else ""
            problems.append(f"{field}{value}: {e['msg']}" if field else str(e["msg"]))
        raise CheckpointError(f"{path}: {_listed(problems)}") from error


def open_safetensors(folder: Path) -> dict[str, Stored]:
    """The tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` lists."""
    single, index = folder / WEIGHTS, folder / WEIGHTS_INDEX
    if single.exists() or not index.exists():
        return _open_safetensors_file(single)
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(
        isinstance(s, str) and Path(s).name == s and s.endswith(".safetensors") for s in shard_of.values()
    ):
        raise CheckpointError(f"{index}: weight_map must map tensor names to files beside it")
    stored: dict[str, Stored] = {}
    for shard in sorted(set(shard_of.values())):
        held = _open_safetensors_file(folder / shard)
        listed = {name for name, file in shard_of.items() if file == shard}
        if held.keys() != listed:
            problems = [f"{name} is listed, but not there" for name in sorted(listed - held.keys())]
            problems += [f"{name} is there, but not listed" for name in sorted(held.keys() - listed)]
            raise CheckpointError(f"{folder / shard}: does not hold what {WEIGHTS_INDEX} says: {_listed(problems)}")
        stored |= held
    return stored


def _open_safetensors_file(path: Path) -> dict[str, Stored]:
    stored: dict[str, Stored] = {}
    try:
        archive = safe_open(path, framework="pt")
        for name in archive.keys():  # noqa: SIM118 - not a mapping
            part = archive.get_slice(name)

            def map_tensor(name: str = name) -> Tensor:
                tensor: Tensor = archive.get_tensor(name)
                return tensor

            stored[name] = Stored(path, tuple(part.get_shape()), part.get_dtype(), map_tensor)
    except OSError as error:
        raise CheckpointError(f"{path}: {_reason(error)}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {_reason(error)}") from error
    return stored


def open_torch(path: Path) -> dict[str, Stored]:
    """The state dict of a file that torch.save wrote, bare or under "model". Only tensors are unpickled."""
    try:
        data = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: {_reason(error)}") from error
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: not a whole file of tensors by torch.save: {_reason(error)}") from error
    state = data.get("model", data) if isinstance(data, dict) else data
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"{path}: expected a state dict of tensors, bare or under 'model'")

    def stored(tensor: Tensor) -> Stored:
        return Stored(path, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), lambda: tensor)

    return {name: stored(tensor) for name, tensor in state.items()}


def check(stored: Mapping[str, Stored], expected: Mapping[str, Shape], where: Path) -> None:
    """Raises CheckpointError, listing the first problems, unless names and shapes agree and dtypes are usable."""
    problems = [
        f"tensor {name} is missing, expected shape {list(shape)}"
        for name, shape in expected.items()
        if name not in stored
    ]
    problems += [
        f"tensor {name} has shape {list(stored[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    problems += [
        f"tensor {name} of shape {list(tensor.shape)} is not part of this model"
        for name, tensor in stored.items()
        if name not in expected
    ]
    problems += [
        f"tensor {name} has dtype {tensor.dtype}, expected float32, bfloat16 or float16"
        for name, tensor in stored.items()
        if tensor.dtype not in _DTYPES
    ]
    if problems:
        raise CheckpointError(f"{where}: {_listed(problems)}")


def _listed(problems: list[str]) -> str:
    more = len(problems) - _SHOWN
    return "; ".join(problems[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return (error.strerror or "no such file").lower()
    return (str(error).splitlines() or [type(error).__name__])[0]
