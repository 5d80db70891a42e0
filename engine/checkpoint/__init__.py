"""Checkpoints: three formats in, one out, tensors mapped from the files rather than read.

| format  | folder holds                                                         | read by                |
|---------|----------------------------------------------------------------------|------------------------|
| fastblt | config.json with a section `fastblt`, model*.safetensors             | `hf` (what we write)   |
| hf      | config.json of Hugging Face's BltForCausalLM, model*.safetensors     | `hf`                   |
| meta    | params.json or config.json with `args`, consolidated.pth or          | `meta`                 |
|         | model.safetensors, entropy_model/ in or beside the folder            |                        |
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import ModelConfig
from . import hf, hf_config
from .errors import CheckpointError
from .files import CONFIG, read_json
from .names import expected_shapes
from .presets import PRESETS, RandomTensors, calibrate, calibrated, random_tensors

__all__ = [
    "PRESETS",
    "Checkpoint",
    "CheckpointError",
    "RandomTensors",
    "calibrate",
    "calibrated",
    "expected_shapes",
    "load",
    "random_tensors",
    "read_config",
    "save",
]

@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`tensors` are mapped from the files, in the files' dtypes, under the names of `expected_shapes(config)`."""

    config: ModelConfig
    tensors: dict[str, Tensor]


def load(path: str | Path) -> Checkpoint:
    folder = Path(path)
    return Checkpoint(*hf.read(folder, read_json(folder / CONFIG)))


def save(
    path: str | Path, config: ModelConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> None:
    hf.write(Path(path), config, tensors, dtype)


def read_config(path: str | Path) -> ModelConfig:
    folder = Path(path)
    return hf_config.parse(read_json(folder / CONFIG), folder / CONFIG)[1]
