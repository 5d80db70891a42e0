"""A model by its name on the Hugging Face hub: what the user gave becomes a folder on this machine.

The library `huggingface_hub` downloads, with its cache, its token and its settings (HF_HOME, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE). It is imported only where a name leads to the hub, and torch never: the process that serves HTTP
downloads before it starts the engine's.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..config import EngineConfig
from .reference import HubError, Reference

__all__ = ["HubError", "local_folder", "localised", "pinned"]

USAGE = "give the folder of a checkpoint, or the name of a model on the Hugging Face hub: org/name[/folder][@revision]"


def local_folder(given: str, *, weights: bool = True) -> Path:
    """`given` itself if it is a folder, else the folder in the hub's cache, after what it lacks was downloaded.

    The latter is `.../models--org--name/snapshots/COMMIT`, plus the folder inside the repository if one was named; the
    files in it are links. Without `weights` only JSON files are downloaded. Raises HubError; KeyboardInterrupt if
    SIGINT or SIGTERM comes while it downloads.
    """
    if os.path.isdir(given):
        return Path(given)
    reference = _reference(given)

    from .download import download

    return download(reference, weights)


def localised(config: EngineConfig) -> EngineConfig:
    """With the model and its patcher in folders on this machine. Raises as `local_folder` does."""
    return _with_each(config, lambda given: str(local_folder(given)))


def pinned(config: EngineConfig) -> EngineConfig:
    """What gives the same model and patcher on every machine: absolute paths of folders, or names on the hub with the
    commit as their revision. Downloads and raises as `local_folder` does."""
    return _with_each(config, _pinned)


def _with_each(config: EngineConfig, change: Callable[[str], str]) -> EngineConfig:
    patcher = config.patcher and change(config.patcher)
    return replace(config, model=change(config.model), patcher=patcher)


def _pinned(given: str) -> str:
    folder = local_folder(given)
    if os.path.isdir(given):
        return str(folder.absolute())
    reference = _reference(given)
    depth = len(Path(reference.folder).parts)
    return str(replace(reference, revision=(folder.parents[depth - 1] if depth else folder).name))


def _reference(given: str) -> Reference:
    if os.path.exists(given):
        raise HubError(f"{given}: not a directory; {USAGE}")
    if (reference := Reference.parse(given)) is None:
        raise HubError(f"{given}: no such directory; {USAGE}")
    return reference
