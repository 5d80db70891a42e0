"""Checkpoints in Hugging Face's layout, ours included: `config.json` and safetensors, single or sharded."""

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..config import ModelConfig
from ..layout import CONFIG, WEIGHTS, WEIGHTS_INDEX
from . import hf_config
from .base import Checkpoint, CheckpointError, Format
from .files import Stored, check, open_safetensors
from .names import ENCODER, FUSED_HASHES, Shape, cross_attention, expected_shapes, hash_table

SHARD_BYTES = 2 << 30
UNFINISHED = ".unfinished-"
"""How the name of a folder begins in which files are made; a process that is killed leaves it."""


def read(path: Path, data: dict[str, Any]) -> Checkpoint:
    """The checkpoint in folder `path`, whose `config.json` holds `data`."""
    file_config, config = hf_config.parse(data, path / CONFIG)
    stored = open_safetensors(path)
    crosses = file_config.cross_layers_of_encoder
    check(stored, _file_shapes(config, crosses), path / CONFIG, hf_config.said(config))
    files = tuple(sorted({s.file for s in stored.values()}))
    kind: Format = "fastblt" if file_config.fastblt else "hf"
    notes = tuple(file_config.notes(path / CONFIG))
    found = _canonical(config, stored, crosses)
    tensors = {name: tensor for name, (tensor, _) in found.items()}
    return Checkpoint(config, tensors, kind, files, {name: place for name, (_, place) in found.items()}, notes)


def _file_shapes(config: ModelConfig, crosses: int) -> dict[str, Shape]:
    """The tensors of a file: hash tables fused, and `crosses` cross-attention layers in the encoder."""
    shapes = expected_shapes(config) | cross_attention(ENCODER, config.encoder, crosses)
    for t in range(config.hashes.num_tables):
        del shapes[hash_table(t)]
    shapes[FUSED_HASHES] = (config.hashes.num_tables * config.hashes.rows, config.encoder.dim)
    return shapes


def _canonical(config: ModelConfig, stored: Mapping[str, Stored], crosses: int) -> dict[str, tuple[Tensor, str]]:
    """The tensors with their places, by the names of `expected_shapes`."""
    found = {name: (s.map(), s.place) for name, s in stored.items()}
    fused, place = found.pop(FUSED_HASHES)
    for t, table in enumerate(fused.split(config.hashes.rows)):
        found[hash_table(t)] = table, place
    if not config.encoder_refine:
        # Hugging Face pools again in every layer, so that only the last layer's cross-attention has an effect.
        for layer in range(crosses):
            for name in cross_attention(ENCODER, config.encoder, 1):
                stored_name = name.replace("layers.0", f"layers.{layer}")
                found[name] = found.pop(stored_name)
    return {name: found[name] for name in expected_shapes(config)}


def write(path: Path, config: ModelConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Writes our own format into folder `path`; old files stay until all new ones are written.

    One shard is in memory at a time, in addition to `tensors`. These may be mapped from the files that are replaced.
    Raises CheckpointError and OSError.
    """
    expected = expected_shapes(config)
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors or name not in expected:
            problem = "is missing" if name in expected else "is not part of this model"
            raise CheckpointError(f"{path}: not written, tensor {name} {problem}")
    file_dtype = dtype or tensors["lm_head.weight"].dtype
    rendered = hf_config.render(config, str(file_dtype).removeprefix("torch."))
    shapes = _file_shapes(config, config.encoder.num_layers if config.encoder_refine else 1)
    sizes = {name: prod(shape) * file_dtype.itemsize for name, shape in shapes.items()}
    shards = list(_shards(sizes))

    path.mkdir(parents=True, exist_ok=True)
    for killed in path.glob(f"{UNFINISHED}*"):
        rmtree(killed)
    with TemporaryDirectory(dir=path, prefix=UNFINISHED) as beside:
        unfinished = Path(beside)
        files = [WEIGHTS]
        if len(shards) > 1:
            files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
            weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            _write_json(unfinished / WEIGHTS_INDEX, index)
        for file, names in zip(files, shards, strict=True):
            gathered = {name: _gather(config, name, shapes[name], tensors, dtype) for name in names}
            write_tensors(unfinished / file, gathered, {"format": "pt"})
            del gathered
            (unfinished / file).chmod(0o644)  # the library lets only the owner read it
        _write_json(unfinished / CONFIG, rendered)
        for old in path.glob("model*.safetensors*"):
            old.unlink()
        for new in unfinished.iterdir():
            new.replace(path / new.name)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a file of safetensors. Raises OSError, which names it."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # also for a full disk
        raise OSError(f"{path}: not written: {error}") from None


def _shards(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Names in groups of at most SHARD_BYTES; a larger tensor has a shard to itself."""
    names: list[str] = []
    total = 0
    for name, size in sizes.items():
        if names and total + size > SHARD_BYTES:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    yield names


def _gather(
    config: ModelConfig, name: str, shape: Shape, tensors: Mapping[str, Tensor], dtype: torch.dtype | None
) -> Tensor:
    """The tensor as the file holds it. Raises CheckpointError if it has another shape."""
    if name != FUSED_HASHES:
        return _shaped(name, shape, tensors[name]).to("cpu", dtype).contiguous()
    rows = config.hashes.rows
    fused = torch.empty(shape, dtype=dtype or tensors[hash_table(0)].dtype)
    for t, part in enumerate(fused.split(rows)):
        part.copy_(_shaped(hash_table(t), (rows, shape[1]), tensors[hash_table(t)]))
    return fused


def _shaped(name: str, shape: Shape, tensor: Tensor) -> Tensor:
    if tensor.shape != shape:
        raise CheckpointError(f"not written, tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}")
    return tensor


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")
