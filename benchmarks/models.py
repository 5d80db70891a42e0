"""Models with random weights, made on demand and kept in a folder that runs can share."""

import json
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from engine.checkpoint import PRESETS, RandomTensors, calibrated, expected_shapes, save
from engine.checkpoint.files import DTYPES
from engine.checkpoint.hf_config import render
from engine.checkpoint.names import FUSED_HASHES, HASHES
from engine.config import ModelConfig
from engine.layout import CONFIG, WEIGHTS

Form = Literal["fast", "released", "hf"]
"""fast: as in Fast-BLT, with a [MASK] and a decoder that reads bytes. released: as the released BLT, whose decoder
reads the encoder's states. hf: the same, without features in which Hugging Face differs."""
HASH_ROWS = 10_007
"""Rows of each hash table, 500,002 as released: a byte reads one row of each table, whatever its size."""
LONGEST_PATCH = 8


class Drawn(RandomTensors):
    """The same distributions, drawn on the device: a GPU draws a billion numbers at once."""

    def __init__(self, config: ModelConfig, seed: int, dtype: torch.dtype, device: str) -> None:
        super().__init__(config, seed, dtype)
        self._device = device
        self._place = {name: place for place, name in enumerate(self._shapes)}

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=self._dtype)
        generator = torch.Generator(self._device).manual_seed(self._seed * len(self._place) + self._place[name])
        drawn = torch.empty(shape, dtype=self._dtype, device=self._device)
        return drawn.normal_(0, self._scale(name, shape), generator=generator).cpu()


def random_model(
    work: Path, shape: str, form: Form, *, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> Path:
    """A folder in `work` with a model of that shape, drawn there unless it exists."""
    folder = work / f"{shape}-{form}-{dtype}".replace("torch.", "")
    if not folder.exists():
        config = shaped(shape, form)
        tensors = Drawn(config, 0, dtype, device)
        # An interrupted write must not leave half a model for the next run.
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        save(unfinished, calibrated(config, tensors), tensors, dtype)
        unfinished.replace(folder)
    return folder


def shaped(shape: str, form: Form) -> ModelConfig:
    """A preset in a form, with small hash tables."""
    config = PRESETS[shape]
    hashes = replace(config.hashes, rows=min(config.hashes.rows, HASH_ROWS))
    # The random patcher may never open a patch in the text that random weights write; the released one has no limit.
    # Hugging Face's rule for the longest patch is not consistent between a text and its beginning.
    patching = replace(config.patching, max_patch_length=None if form == "hf" else LONGEST_PATCH)
    config = replace(config, hashes=hashes, patching=patching)
    if form == "fast":
        return replace(config, decoder_input="embedding", mask_id=config.vocab_size, block_size=8)
    config = replace(config, decoder_input="encoder", mask_id=None, block_size=None)
    if form == "released":
        return config
    # A text never has more patches than bytes.
    global_ = replace(config.global_, max_positions=config.encoder.max_positions)
    return replace(config, global_=global_, isolate_documents=False)


def released_model(work: Path, shape: str, tables: Literal["BF16", "F32"]) -> Path:
    """A folder in `work` with a model of that shape in the files of Hugging Face's conversions: their names, sizes and
    dtypes. Weights are random; the hash tables are a hole at the end of the file, which reads as zeros and takes no
    room on the disk."""
    folder, config = work / f"{shape}-as-released-{tables}", PRESETS[shape]
    if folder.exists():
        return folder
    tensors = Drawn(config, 0, torch.bfloat16, "cpu")
    shapes = {name: shape for name, shape in expected_shapes(config).items() if not name.startswith(HASHES)}
    shapes[FUSED_HASHES] = (config.hashes.num_tables * config.hashes.rows, config.encoder.dim)
    header, end = {}, 0
    for name, size in shapes.items():
        dtype = tables if name == FUSED_HASHES else "BF16"
        start, end = end, end + prod(size) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": size, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    with (unfinished / WEIGHTS).open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in shapes:
            if name != FUSED_HASHES:
                file.write(tensors[name].view(torch.int16).numpy().tobytes())
        file.truncate(8 + len(encoded) + end)
    rendered = render(config, "bfloat16")
    del rendered["fastblt"]
    (unfinished / CONFIG).write_text(json.dumps(rendered))
    unfinished.replace(folder)
    return folder


def described(shape: str, form: Form) -> list[str]:
    """How such a model differs from the released one of its size."""
    said = ["random weights"]
    rows, released = shaped(shape, form).hashes.rows, PRESETS[shape].hashes.rows
    if rows < released:
        said.append(f"hash tables of {rows:,} rows instead of {released:,}")
    return [*said, *([] if form == "hf" else [f"patches of at most {LONGEST_PATCH} bytes"])]
