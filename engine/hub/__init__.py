"""A model by its name on the Hugging Face hub: turns what the user gave into a folder on this machine.

The library `huggingface_hub` downloads, with its cache, its token and its settings (HF_HOME, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE). It is imported only if a name is not a folder. torch is never imported: the process that serves HTTP
downloads before it starts the engine's.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..config import EngineConfig
from .reference import HubError, Reference

__all__ = ["HubError", "local_folder", "localised", "pinned", "pinned_names"]

USAGE = "give the folder of a checkpoint, or the name of a model on the Hugging Face hub: org/name[/folder][@revision]"


def local_folder(given: str, *, weights: bool = True) -> Path:
    """`given` itself if it is a folder, else the folder in the hub's cache, after missing files were downloaded.

    The latter is `.../models--org--name/snapshots/COMMIT`, plus the folder inside the repository if one was named; the
    files in it are links. Without `weights` only JSON files are downloaded. Raises HubError; KeyboardInterrupt at
    SIGINT or SIGTERM during a download.
    """
    if os.path.isdir(given):
        return Path(given)
    reference = _reference(given)

    from .download import download

    return download(reference, weights)


def localised(config: EngineConfig) -> EngineConfig:
    """The configuration with its model and patcher as folders on this machine. Raises as `local_folder` does."""
    return _with_each(config, lambda given: str(local_folder(given)))


def pinned(config: EngineConfig) -> EngineConfig:
    """The configuration with names that mean the same model and patcher every time: absolute paths of folders, or names
    on the hub with a commit as their revision. Downloads and raises as `local_folder` does."""
    return _with_each(config, _pinned)


def pinned_names(config: EngineConfig) -> EngineConfig:
    """As `pinned`, but downloads no weights, and absolute paths may be those of other machines."""
    return _with_each(config, lambda given: given if os.path.isabs(given) else _pinned(given, weights=False))


def _with_each(config: EngineConfig, change: Callable[[str], str]) -> EngineConfig:
    patcher = config.patcher and change(config.patcher)
    return replace(config, model=change(config.model), patcher=patcher)


def _pinned(given: str, *, weights: bool = True) -> str:
    folder = local_folder(given, weights=weights)
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
