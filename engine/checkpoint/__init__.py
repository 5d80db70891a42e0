"""Checkpoints: reads three formats and writes one. Tensors are mapped from the files rather than read.

| format  | a folder with                                                        | module |
|---------|----------------------------------------------------------------------|--------|
| fastblt | config.json with a section `fastblt`, safetensors; what `save` writes | `hf`   |
| hf      | config.json of Hugging Face's BltForCausalLM, safetensors            | `hf`   |
| meta    | params.json or config.json with `args`, consolidated.pth or          | `meta` |
|         | model.safetensors; entropy_model/ in or beside it                    |        |
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..config import ModelConfig
from . import hf
from .base import Checkpoint, CheckpointError
from .describe import Description, count_parameters, describe, render
from .fingerprints import fingerprint
from .names import expected_shapes
from .presets import PRESETS, RandomTensors, calibrate, calibrated, random_tensors
from .reading import load, read_config

__all__ = [
    "PRESETS",
    "Checkpoint",
    "CheckpointError",
    "Description",
    "RandomTensors",
    "calibrate",
    "calibrated",
    "count_parameters",
    "describe",
    "expected_shapes",
    "fingerprint",
    "load",
    "random_tensors",
    "read_config",
    "render",
    "save",
]


def save(
    path: str | Path, config: ModelConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> None:
    """Writes our own format, in `dtype` if given, into a folder that need not exist yet. Raises CheckpointError and
    OSError."""
    hf.write(Path(path), config, tensors, dtype)
