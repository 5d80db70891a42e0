"""Finds out a folder's format and reads it."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import foreign
from ..config import ModelConfig
from ..layout import CONFIG, PARAMS
from . import hf, hf_config, meta
from .base import Checkpoint, CheckpointError
from .files import is_there, read_json, require_folder


def load(path: str | Path, *, patcher: str | Path | None = None, patching_threshold: float | None = None) -> Checkpoint:
    """The checkpoint in a folder. Every name and shape is checked; no tensor is read.

    patcher: the folder of the patcher, for a model in Meta's layout whose patcher is elsewhere. patching_threshold: in
    nats, instead of the checkpoint's own.

    Raises CheckpointError.
    """
    folder, patcher = Path(path), Path(patcher) if patcher is not None else None
    data = _hf_data(folder)
    if data is None:
        found = meta.read(folder, patcher)
    else:
        _refuse_patcher(folder, patcher)
        found = hf.read(folder, data)
    return replace(found, config=_with_threshold(found.config, patching_threshold))


def read_config(path: str | Path, *, patcher: str | Path | None = None) -> ModelConfig:
    """The configuration alone, without looking at tensors. patcher: as for `load`. Raises CheckpointError."""
    folder, patcher = Path(path), Path(patcher) if patcher is not None else None
    data = _hf_data(folder)
    if data is None:
        return meta.read_config(folder, patcher)[0]
    _refuse_patcher(folder, patcher)
    return hf_config.parse(data, folder / CONFIG)[1]


def _with_threshold(config: ModelConfig, threshold: float | None) -> ModelConfig:
    if threshold is None:
        return config
    if not math.isfinite(threshold):
        raise CheckpointError(f"patching_threshold {threshold}: must be a finite number of nats")
    if config.patching.mode == "bytes":
        raise CheckpointError(
            f"patching_threshold {threshold:g}: {config.name} has no threshold, as each of its patches is one byte"
        )
    return replace(config, patching=replace(config.patching, threshold=threshold))


def _refuse_patcher(folder: Path, patcher: Path | None) -> None:
    if patcher is not None:
        raise CheckpointError(
            f"patcher {patcher}: the model in {folder} contains its own; only a model in Meta's layout takes one"
        )


def _hf_data(folder: Path) -> dict[str, Any] | None:
    """The contents of config.json; None if the folder is in Meta's layout."""
    require_folder(folder)
    if is_there(folder / PARAMS):
        return None
    if not is_there(folder / CONFIG):
        raise CheckpointError(foreign.explain_folder(folder))
    data = read_json(folder / CONFIG)
    if kind := foreign.kind_of_config(data):
        raise CheckpointError(f"{folder / CONFIG}: this is {kind}. {foreign.READ_INSTEAD}")
    return None if "args" in data else data
