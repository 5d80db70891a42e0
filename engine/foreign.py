"""Checkpoints that are not a complete BLT: what they are, in words that their users know.

Reads only file names and JSON, so that a model from the hub can be refused before its weights are downloaded.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from .layout import CONFIG, CONSOLIDATED, ENTROPY_FOLDER, PARAMS

READ_INSTEAD = (
    "fastblt reads byte-latent transformers (BLT): Hugging Face's (config.json with model_type 'blt'), "
    "Meta's (params.json, or config.json with 'args') and its own"
)

_BYTE_MODELS = {"bolmo": "Bolmo", "evabyte": "EvaByte", "hnet": "H-Net", "byt5": "ByT5", "canine": "CANINE"}
_BYT5_VOCABULARY = 384


def kind_of_config(config: Mapping[str, Any]) -> str | None:
    """What kind of model a `config.json` is for, as 'EvaByte, another kind of byte model'; None if perhaps a BLT."""
    if config.get("model_type") == "blt" or "args" in config:
        return None
    kind = config.get("model_type")
    if "arch_layout" in config:
        kind = "hnet"
    if kind == "t5" and config.get("vocab_size") == _BYT5_VOCABULARY:
        kind = "byt5"
    if not isinstance(kind, str):
        return "a model of no known kind: it has no model_type"
    if kind in _BYTE_MODELS:
        return f"{_BYTE_MODELS[kind]}, another kind of byte model"
    return f"a model of the kind {kind!r}"


def kind_of_files(names: Collection[str]) -> str | None:
    """What a folder without a BLT's configuration or weights is, by its files' names; None if they do not show it."""

    def some(*endings: str) -> str | None:
        return next((name for name in sorted(names) if name.endswith(endings)), None)

    if "adapter_config.json" in names:
        return "a PEFT adapter (adapter_config.json), which changes another model: merge the two and save the whole"
    if found := some(".gguf"):
        return f"a model in the GGUF format ({found}), which is llama.cpp's"
    if some(".distcp"):
        return "a checkpoint of Meta's training in pieces (.distcp), which its own code joins into consolidated.pth"
    if found := some(".incomplete"):
        return f"an unfinished download ({found})"
    if any(name.startswith("hnet_") for name in names) and some(".pt"):
        return "H-Net, another kind of byte model"
    if found := some("pytorch_model.bin", "pytorch_model.bin.index.json"):
        return f"a model with pickled weights ({found}), which may run code: save it as safetensors with transformers"
    return None


def models_inside(folder: Path) -> list[str]:
    """Names of the subfolders that look like models. An entropy model is part of another model."""
    found = {file.parent.name for name in (CONFIG, PARAMS, CONSOLIDATED) for file in folder.glob(f"*/{name}")}
    return sorted(found - {ENTROPY_FOLDER})


def explain_folder(folder: Path) -> str:
    """Why a folder without a BLT's configuration or weights cannot be read: one line."""
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError as error:
        return f"{folder}: {error.strerror}"
    if kind := kind_of_files(names):
        return f"{folder}: this is {kind}. {READ_INSTEAD}"
    if inside := models_inside(folder):
        shown = ", ".join(str(folder / name) for name in inside[:4]) + (", ..." if len(inside) > 4 else "")
        return f"{folder}: this folder is not a model, but contains some. Name one of them: {shown}"
    return f"{folder}: there is no config.json or params.json. {READ_INSTEAD}"
