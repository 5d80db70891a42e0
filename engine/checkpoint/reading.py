"""Which format a folder is in, and reading it."""

from pathlib import Path
from typing import Any

from ..config import ModelConfig
from . import hf, hf_config, meta
from .base import Checkpoint, CheckpointError
from .files import CONFIG, read_json


def load(path: str | Path) -> Checkpoint:
    """The checkpoint in a folder. Every name and shape is checked; no tensor is read.

    Raises CheckpointError.
    """
    folder = Path(path)
    data = _hf_data(folder)
    return meta.read(folder) if data is None else hf.read(folder, data)


def read_config(path: str | Path) -> ModelConfig:
    """The configuration alone, without looking at tensors. Raises CheckpointError."""
    folder = Path(path)
    data = _hf_data(folder)
    return meta.read_config(folder) if data is None else hf_config.parse(data, folder / CONFIG)[1]


def _hf_data(folder: Path) -> dict[str, Any] | None:
    """What config.json holds; None if the folder is of Meta's making."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such directory")
    if (folder / meta.PARAMS).exists():
        return None
    data = read_json(folder / CONFIG)
    if "args" in data:
        return None
    if data.get("model_type") != "blt":
        raise CheckpointError(
            f"{folder / CONFIG}: model_type = {data.get('model_type')!r} is not supported, only 'blt'"
        )
    return data
