"""A model by its name on the Hugging Face hub: what the user gave becomes a folder on this machine.

The library `huggingface_hub` downloads, with its cache, its token and its settings (HF_HOME, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE). It is imported only where a name leads to the hub, and torch never: the process that serves HTTP
downloads before it starts the engine's.
"""

import os
from dataclasses import replace
from pathlib import Path

from .reference import HubError, Reference

__all__ = ["HubError", "local_folder", "pinned"]

USAGE = "give the folder of a checkpoint, or the name of a model on the Hugging Face hub: org/name or org/name@revision"


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


def pinned(given: str) -> str:
    """What gives the same model on every machine: the absolute path of a folder, or the name on the hub with the commit
    as its revision. Downloads the model and raises as `local_folder` does."""
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
