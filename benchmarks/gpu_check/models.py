"""Models with random weights, made where they are needed and kept for the run."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from engine.checkpoint import PRESETS, RandomTensors, calibrated, random_tensors, save
from engine.config import ModelConfig

from .setting import Setting

Form = Literal["released", "fast"]
HASH_ROWS = 10_007
"""Rows of each hash table, 500,002 as released: a byte reads one row of each, however many there are."""


class Drawn(RandomTensors):
    """The same laws, drawn on the device: a GPU draws a billion numbers in no time."""

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


def tiny(setting: Setting) -> Path:
    """The preset "tiny"."""
    folder = setting.work / "tiny"
    if not folder.exists():
        tensors = random_tensors(PRESETS["tiny"], 0)
        _save(folder, calibrated(PRESETS["tiny"], tensors), tensors, torch.float32)
    return folder


def tiny_released(setting: Setting) -> Path:
    """As small, in the form of released models: the decoder reads the encoder's states, and there is no [MASK]."""
    folder = setting.work / "tiny-released"
    if not folder.exists():
        config = config_1b("released", toy=True)
        tensors = random_tensors(config, 0)
        _save(folder, calibrated(config, tensors), tensors, torch.float32)
    return folder


def shape_1b(setting: Setting, form: Form) -> Path:
    """The paper's 1B: as released, or in Fast-BLT's form, with a [MASK] and a decoder that reads bytes."""
    folder = setting.work / f"1b-{form}"
    if not folder.exists():
        config = config_1b(form, toy=setting.quick)
        tensors = Drawn(config, 0, torch.bfloat16, setting.device)
        _save(folder, calibrated(config, tensors), tensors, torch.bfloat16)
    return folder


def config_1b(form: Form, *, toy: bool) -> ModelConfig:
    """With patches of at most 8 bytes and small hash tables. toy: its form with the stacks of the preset "tiny"."""
    config = PRESETS["1b"]
    # The random patcher may never open a patch in the text that random weights write; the released one has no limit.
    rule = replace(config.patching, max_patch_length=8)
    config = replace(config, patching=rule, hashes=replace(config.hashes, rows=257 if toy else HASH_ROWS))
    if toy:
        small = PRESETS["tiny"]
        config = replace(
            config, encoder=small.encoder, global_=small.global_, decoder=small.decoder, patcher=small.patcher
        )
    if form == "fast":
        config = replace(config, decoder_input="embedding", mask_id=260, block_size=8)
    return config


def _save(folder: Path, config: ModelConfig, tensors: RandomTensors | dict[str, Tensor], dtype: torch.dtype) -> None:
    # A part that is cut while it writes must not leave half a model for the next one.
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    save(unfinished, config, tensors, dtype)
    unfinished.replace(folder)
