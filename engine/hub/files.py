"""Which files of a repository a model needs, in the layouts of released models. Paths are relative to its root."""

import json
import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any

from .. import foreign
from ..layout import (
    CONFIG,
    CONSOLIDATED,
    DECODERS,
    ENTROPY_FOLDER,
    PARAMS,
    TRAIN_ARGS,
    WEIGHTS,
    WEIGHTS_INDEX,
)
from .reference import HubError, Reference

_JSON = (CONFIG, PARAMS, TRAIN_ARGS, WEIGHTS_INDEX, DECODERS)
_SHARD = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)


def json_files(reference: Reference) -> list[str]:
    """All JSON files that may be needed; few of them exist."""
    return [_join(folder, name) for folder in (reference.folder, *_patchers(reference.folder)) for name in _JSON]


def check_is_blt(reference: Reference, root: Path) -> None:
    """Raises HubError if the JSON files, which are in `root`, are those of another kind of model: before gigabytes are
    downloaded."""
    folder = root / reference.folder
    if not _is_metas(folder) and (kind := foreign.kind_of_config(_config(folder))):
        raise HubError(f"{reference}: this is {kind}. {foreign.READ_INSTEAD}")


def weight_files(reference: Reference, root: Path, files: Collection[str]) -> list[str]:
    """The files with tensors, among the repository's `files`; the JSON files are in `root`. Raises HubError."""
    folder = reference.folder
    found = _weights(folder, root, files)
    if not found or not is_model(root / folder):
        raise HubError(f"{reference}: {what_is_there(reference, files)}")
    if _is_metas(root / folder):
        # The first patcher that exists, as in loading.
        beside = [_weights(patcher, root, files) for patcher in _patchers(folder) if is_model(root / patcher)]
        found += beside[0] if beside else []
    return found


def is_model(folder: Path) -> bool:
    """Whether a model's own JSON file is in the folder."""
    return (folder / CONFIG).is_file() or (folder / PARAMS).is_file()


def what_is_there(reference: Reference, files: Collection[str]) -> str:
    """Why there is no model at `reference`, and where the repository has models."""
    folders = sorted({str(PurePosixPath(file).parent).removeprefix(".") for file in files})
    models = [
        f"{reference.repository}/{folder}".rstrip("/")
        for folder in folders
        if PurePosixPath(folder).name != ENTROPY_FOLDER and folder != reference.folder and _holds_model(folder, files)
    ]
    missing = reference.folder and not any(file.startswith(f"{reference.folder}/") for file in files)
    problem = f"the repository has no folder {reference.folder}" if missing else "no BLT is in it"
    if models:
        return f"{problem}; its models are {', '.join(models)}"
    inside = [file.removeprefix(f"{reference.folder}/") for file in files]
    if kind := foreign.kind_of_files(inside):
        return f"this is {kind}. {foreign.READ_INSTEAD}"
    needed = f"{CONFIG} or {PARAMS} beside {WEIGHTS}, the shards of {WEIGHTS_INDEX}, or {CONSOLIDATED}"
    shown = ", ".join(sorted(files)[:4]) + (", ..." if len(files) > 4 else "")
    return f"{problem}: a BLT needs {needed}; the repository holds {shown or 'nothing'}"


def _holds_model(folder: str, files: Collection[str]) -> bool:
    described = any(_join(folder, name) in files for name in (CONFIG, PARAMS))
    return described and any(_join(folder, name) in files for name in (WEIGHTS, WEIGHTS_INDEX, CONSOLIDATED))


def _weights(folder: str, root: Path, files: Collection[str]) -> list[str]:
    """Safetensors if there are any, else the file by torch.save; one file rather than shards; [] if there is none."""
    if (single := _join(folder, WEIGHTS)) in files:
        return [single]
    if _join(folder, WEIGHTS_INDEX) in files:
        return [_join(folder, shard) for shard in _shards(root / folder / WEIGHTS_INDEX)]
    if (consolidated := _join(folder, CONSOLIDATED)) in files:
        return [consolidated]
    return []


def _shards(index: Path) -> list[str]:
    listed = _read(index).get("weight_map")
    shards = set(listed.values()) if isinstance(listed, dict) else set()
    if not shards or not all(isinstance(shard, str) and _SHARD.fullmatch(shard) for shard in shards):
        raise HubError(f"{index}: weight_map must map tensor names to safetensors files beside it")
    return sorted(shards)


def _is_metas(folder: Path) -> bool:
    """Whether its patcher is a model of its own."""
    return (folder / PARAMS).is_file() or "args" in _config(folder)


def _config(folder: Path) -> dict[str, Any]:
    return _read(folder / CONFIG) if (folder / CONFIG).is_file() else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise HubError(f"{path}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise HubError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def _patchers(folder: str) -> tuple[str, str]:
    """Where the patcher of Meta's models may be: inside the model's folder or beside it."""
    beside = str(PurePosixPath(folder).parent).removeprefix(".") if folder else ""
    return _join(folder, ENTROPY_FOLDER), _join(beside, ENTROPY_FOLDER)


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
