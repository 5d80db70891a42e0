"""Opens files of tensors without reading the tensors: they are listed with their shapes and mapped into memory.

A mapped tensor's pages are read from the file when they are first used, and can be dropped again: nothing is copied.
Files are mapped read-only, which the operating system allows at any size. Libraries map them as private copies, which
it refuses for files larger than the machine's memory.
"""

import json
import mmap
import os
import stat
import struct
import warnings
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from errno import EFBIG, EINVAL, EISDIR, ENOMEM, ENOTDIR
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from .. import foreign
from ..config import StackConfig
from ..layout import WEIGHTS, WEIGHTS_INDEX
from .base import CheckpointError, printable
from .names import Shape

DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""The dtypes of stored models, as safetensors and torch spell them."""
LFS_POINTER = b"version https://git-lfs"
MOST_JSON_BYTES = 16 << 20
"""Of a configuration or an index of shards. The indexes of the largest models have 9 MB."""
MOST_JSON_DEPTH = 32
_SHOWN = 4
"""Most problems listed in one message."""

Validated = TypeVar("Validated", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file. `map` returns it, backed by the file; it must not be written to."""

    file: Path
    name: str
    shape: Shape
    dtype: str
    map: Callable[[], Tensor]

    @property
    def place(self) -> str:
        return f"{self.file}: tensor {self.name}"


def model_name(folder: Path) -> str:
    """The folder's name or, for a snapshot in the hub's cache, the repository's: org/name. Links are not followed: the
    files that they lead to are named by their hashes."""
    parts = Path(os.path.abspath(folder)).parts
    for at, part in enumerate(parts):
        if part.startswith("models--") and parts[at + 1 : at + 2] == ("snapshots",) and len(parts) > at + 2:
            return printable("/".join([*part.removeprefix("models--").split("--"), *parts[at + 3 :]]))
    return printable(parts[-1])


def is_there(path: Path) -> bool:
    """Whether there is such a file, folder or link. Raises CheckpointError if the system does not let us see."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise CheckpointError(f"{path}: {_reason(error)}") from error
    return True


def kind_of_folder(folder: Path) -> str | None:
    """What kind of foreign model is in a folder, by the names of its files; None if they do not show it."""
    try:
        return foreign.kind_of_files(os.listdir(folder))
    except OSError:
        return None


def require_folder(folder: Path) -> None:
    """Raises CheckpointError."""
    try:
        if not stat.S_ISDIR(folder.stat().st_mode):
            raise NotADirectoryError(ENOTDIR, os.strerror(ENOTDIR))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: no such directory") from error
    except OSError as error:
        raise CheckpointError(f"{folder}: {_reason(error)}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError unless the file is a JSON object, of at most `MOST_JSON_BYTES` and `MOST_JSON_DEPTH`."""
    try:
        with _open(path) as file:
            text = file.read(MOST_JSON_BYTES + 1)
        if len(text) > MOST_JSON_BYTES:
            raise OSError(EFBIG, f"larger than {MOST_JSON_BYTES >> 20} MiB, the most that is read of such a file")
        data = json.loads(text.decode())
    except OSError as error:
        raise CheckpointError(f"{path}: {_reason(error, path)}") from error
    except RecursionError:
        data = None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {_reason(error)}") from error
    if data is None or _is_deep(data):
        raise CheckpointError(f"{path}: JSON is nested more than {MOST_JSON_DEPTH} deep")
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def _is_deep(data: object) -> bool:
    """Whether it is nested more than `MOST_JSON_DEPTH` deep: later readers call themselves for each level."""
    level = [data]
    for _ in range(MOST_JSON_DEPTH):
        held = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [inner for items in held for inner in items]
    return any(isinstance(item, dict | list) for item in level)


def validate(kind: type[Validated], data: object, path: Path, inside: str = "") -> Validated:
    """`data`, from `path` under the key `inside`, as `kind`. Raises CheckpointError that names the field and value."""
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
    if is_there(single) or not is_there(index):
        if not is_there(single) and (kind := kind_of_folder(folder)):
            raise CheckpointError(f"{single}: no such file. This is {kind}")
        return _open_safetensors_file(single)
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(
        isinstance(s, str) and Path(s).name == s and s.isprintable() and s.endswith(".safetensors")
        for s in shard_of.values()
    ):
        raise CheckpointError(f"{index}: weight_map must map tensor names to files beside it")
    stored: dict[str, Stored] = {}
    for shard in sorted(set(shard_of.values())):
        held = _open_safetensors_file(folder / shard)
        listed = {name for name, file in shard_of.items() if file == shard}
        if held.keys() != listed:
            problems = [f"{name} is listed, but not in the file" for name in sorted(listed - held.keys())]
            problems += [f"{name} is in the file, but not listed" for name in sorted(held.keys() - listed)]
            raise CheckpointError(f"{folder / shard}: does not match {WEIGHTS_INDEX}: {_listed(problems)}")
        stored |= held
    return stored


def _open_safetensors_file(path: Path) -> dict[str, Stored]:
    try:
        with _open(path) as file:
            # Checks the whole file. Of the library's frameworks only numpy maps a file read-only.
            safe_open(path, framework="np")
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(header_bytes), object_pairs_hook=_without_repeats)
            whole = _map_file(file.fileno())
    except (OSError, MemoryError) as error:
        raise CheckpointError(f"{path}: {_reason(error, path)}") from error
    except (SafetensorError, ValueError) as error:
        broken = f"not a whole safetensors file: {_reason(error)}"
        raise CheckpointError(f"{path}: {_pointer(path) or broken}") from error
    header.pop("__metadata__", None)
    stored: dict[str, Stored] = {}
    for name, entry in header.items():
        shape, offset = tuple(entry["shape"]), 8 + header_bytes + entry["data_offsets"][0]
        stored[name] = Stored(path, name, shape, entry["dtype"], partial(_view, whole, offset, entry["dtype"], shape))
    return stored


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of several tensors of the same name the library takes any one."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"its header has {name} twice")
        found[name] = value
    return found


def _open(path: Path) -> BinaryIO:
    """Raises OSError for all but a regular file, links followed: reading a pipe or a device might never end. Never
    waits."""
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(EISDIR, os.strerror(EISDIR))
    if not stat.S_ISREG(mode):
        raise OSError(EINVAL, "not a regular file, but a pipe, a socket or a device")
    # A pipe that took its place since then must not be waited for.
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))


def _map_file(descriptor: int) -> mmap.mmap:
    return mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)


def _view(whole: mmap.mmap, offset: int, dtype: str, shape: Shape) -> Tensor:
    """A tensor of one of `DTYPES`, stored contiguously in a mapped file from byte `offset` on."""
    count = prod(shape)
    if not count:
        return torch.empty(shape, dtype=DTYPES[dtype])
    with warnings.catch_warnings():
        # The tensor is never written to.
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(whole, dtype=DTYPES[dtype], offset=offset, count=count).view(shape)


def open_torch(path: Path) -> dict[str, Stored]:
    """The state dict of a file by torch.save, at the top or under "model". Only tensors are unpickled."""
    try:
        with _open(path):
            data = _load_torch(path)
    except (OSError, MemoryError) as error:
        raise CheckpointError(f"{path}: {_reason(error, path)}") from error
    except Exception as error:  # a broken pickle can make torch raise anything
        broken = f"not a whole file of tensors by torch.save: {_reason(error)}"
        raise CheckpointError(f"{path}: {_pointer(path) or broken}") from error
    state = data.get("model", data) if isinstance(data, dict) else data
    if not isinstance(state, dict) or not all(isinstance(n, str) and _is_plain(t) for n, t in state.items()):
        raise CheckpointError(f"{path}: expected a state dict of tensors, at the top or under 'model'")

    def stored(name: str, tensor: Tensor) -> Stored:
        # A file may hold transposed or negated views, or parameters: these are copied. Most files hold none.
        return Stored(
            path,
            name,
            tuple(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
            lambda: tensor.detach().resolve_neg().contiguous(),
        )

    return {name: stored(name, tensor) for name, tensor in state.items()}


def _is_plain(given: object) -> bool:
    """Whether it is an ordinary dense tensor with its numbers in memory."""
    return isinstance(given, Tensor) and given.layout == torch.strided and not given.is_nested and not given.is_meta


def _load_torch(path: Path) -> Any:
    """The object in a file by torch.save, its tensors mapped from the file."""
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError as error:
        if "unable to mmap" not in str(error):
            raise
    # The file is larger than the memory. Fake tensors know their place in the file, and take a second to import.
    with FakeTensorMode():
        data = torch.load(path, weights_only=True)
    with path.open("rb") as file:
        whole = _map_file(file.fileno())

    def mapped(tensor: Tensor) -> Tensor:
        storage, dtype = tensor.untyped_storage(), str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            return tensor
        assert storage._checkpoint_offset is not None
        count = storage.nbytes() // tensor.dtype.itemsize
        numbers = _view(whole, storage._checkpoint_offset, dtype, (count,))
        return numbers.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    return tree_map_only(Tensor, mapped, data)


class Said(NamedTuple):
    """What a field of a configuration says of the tensors whose names begin with `prefix`: a size that some of them
    have, or, if that is None, how many layers there are."""

    field: str
    value: int
    prefix: str
    size: int | None


def said_of_stack(stack: StackConfig, prefix: str, dim: str, num_layers: str) -> tuple[Said, Said]:
    """Under the names of these two fields."""
    return Said(dim, stack.dim, prefix, stack.dim), Said(num_layers, stack.num_layers, f"{prefix}layers.", None)


def check(stored: Mapping[str, Stored], expected: Mapping[str, Shape], config: Path, said: Seq[Said]) -> None:
    """Raises CheckpointError unless names and shapes agree and dtypes are usable. It lists the first problems, each
    with what the file `config` says about it."""
    layers = {s.prefix: _num_layers(stored, s.prefix) for s in said if s.size is None}

    def because(name: str) -> str:
        of = [s for s in said if name.startswith(s.prefix)]
        if name in stored and name in expected:
            wrong = {*expected[name]} - {*stored[name].shape}
            told = [f"{s.field} = {s.value}" for s in of if s.size in wrong]
        else:
            counts = [(s, layers[s.prefix]) for s in of if s.size is None]
            told = [f"{s.field} = {s.value}, the file has {count}" for s, count in counts if count != s.value]
        return f" ({config.name}: {', '.join(told)})" if told else ""

    problems = [
        f"tensor {name} is missing, expected shape {list(shape)}{because(name)}"
        for name, shape in expected.items()
        if name not in stored
    ]
    problems += [
        f"tensor {name} has shape {list(stored[name].shape)}, expected {list(shape)}{because(name)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    problems += [
        f"tensor {name} of shape {list(tensor.shape)} is not part of this model{because(name)}"
        for name, tensor in stored.items()
        if name not in expected
    ]
    problems += [
        f"tensor {name} has dtype {tensor.dtype}, expected float32, bfloat16 or float16"
        for name, tensor in stored.items()
        if tensor.dtype not in DTYPES
    ]
    if problems:
        raise CheckpointError(f"{config.parent}: {_listed(problems)}")


def _num_layers(names: Iterable[str], prefix: str) -> int:
    """How many different numbers come after the prefix."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)})


def _listed(problems: list[str]) -> str:
    more = len(problems) - _SHOWN
    return "; ".join(problems[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _pointer(path: Path) -> str | None:
    """What to do about a file that is only a pointer to the weights; None if it is not one."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            return "a Git LFS pointer, not the weights: run `git lfs pull` in its repository to fetch them"
    return None


def _reason(error: Exception, path: Path | None = None) -> str:
    if path and isinstance(error, FileNotFoundError) and os.path.islink(path):
        return "a broken link, perhaps from an unfinished download"
    if path and (isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == ENOMEM)):
        size = path.stat().st_size
        return f"its {size} bytes cannot be mapped: too few addresses (ulimit -v) or too little memory are left"
    if isinstance(error, OSError):
        reason = error.strerror or "no such file"
        return reason[:1].lower() + reason[1:]
    return (str(error).splitlines() or [type(error).__name__])[0]
