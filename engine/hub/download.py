"""Downloads the files that a model needs into the hub's cache, or finds them there."""

import logging
import os
import shutil
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Timer, current_thread, main_thread
from types import FrameType
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.utils.tqdm import tqdm

from . import files
from .errors import explained, is_offline
from .reference import HubError, Reference

log = logging.getLogger("fastblt.hub")

LIBRARY = "fastblt"
"""This program's name in requests to the hub."""
STOP_SECONDS = 5.0
"""Time for the library's threads, which cannot be interrupted, to notice that they should stop."""
_stopped = Event()


class _Bar(tqdm):
    """The library's progress bar, on terminals only. Its threads call `update` with each piece of a file."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["disable"] = kwargs.get("disable") or None
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

    def update(self, n: float | None = 1) -> bool | None:
        if _stopped.is_set():
            raise InterruptedError("stopped by a signal")
        shown: bool | None = super().update(n)
        return shown


class _NoBar(_Bar):
    """No bar, for downloads that take no time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"disable": True})


def download(reference: Reference, weights: bool) -> Path:
    """The model's folder in the cache. Raises HubError, or KeyboardInterrupt at SIGINT or SIGTERM."""
    with _stopping_at_signals(), _quiet():
        with explained(reference):
            # Also stores the revision's commit, so that it is known offline.
            root = _fetch(reference, reference.revision, files.json_files(reference), _NoBar)
        folder = root / reference.folder
        if weights or not files.is_model(folder):
            there, unreachable = _list(reference, root)
            if not files.is_model(folder):
                raise unreachable or HubError(f"{reference}: {files.what_is_there(reference, there)}")
        files.check_is_blt(reference, root)
        if weights:
            _fetch_weights(reference, root, there, unreachable)
        return folder


def _list(reference: Reference, root: Path) -> tuple[set[str], HubError | None]:
    """The repository's files at the commit of `root`; if the hub cannot list them, those in the cache and its error."""
    try:
        with explained(reference):
            info = HfApi(library_name=LIBRARY).model_info(
                reference.repository, revision=root.name, timeout=constants.HF_HUB_ETAG_TIMEOUT
            )
        return {file.rfilename for file in info.siblings or ()}, None
    except HubError as error:
        return {file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()}, error


def _fetch_weights(reference: Reference, root: Path, there: set[str], unreachable: HubError | None) -> None:
    if unreachable:
        try:
            names = files.weight_files(reference, root, there)
        except HubError:
            raise unreachable from None
        if not there.issuperset(names):
            raise unreachable
        if not is_offline():
            log.warning("%s; using what is in the cache", unreachable)
        return
    names = files.weight_files(reference, root, there)
    with explained(reference):
        missing = _bytes_missing(reference, root, names)
        if not missing:
            return
        _check_room(reference, missing)
        log.info("downloading %s: %s into %s", reference, _size(missing), constants.HF_HUB_CACHE)
        _fetch(reference, root.name, names, _Bar)


def _fetch(reference: Reference, revision: str | None, names: list[str], bar: type[_Bar]) -> Path:
    return Path(
        snapshot_download(
            reference.repository,
            revision=revision,
            allow_patterns=names,
            tqdm_class=bar,
            library_name=LIBRARY,
        )
    )


def _bytes_missing(reference: Reference, root: Path, names: list[str]) -> int:
    if all((root / name).is_file() for name in names):
        return 0
    listed = snapshot_download(
        reference.repository,
        revision=root.name,
        allow_patterns=names,
        tqdm_class=_NoBar,
        library_name=LIBRARY,
        dry_run=True,
    )
    return sum(file.file_size or 0 for file in listed if file.will_download)


def _check_room(reference: Reference, needed: int) -> None:
    """Raises HubError if the cache's disk has less than `needed` bytes free."""
    cache = constants.HF_HUB_CACHE
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise HubError(
            f"{reference}: {_size(needed)} to download, but {cache} has room for {_size(free)}; set HF_HOME to move "
            "the cache"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the library's log: its warnings take several lines, and it logs URLs that may be signed. Its exceptions
    become one line each."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "httpx", "httpx2")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            # Warnings of a nearly full disk: `_check_room` raises an error for it.
            warnings.filterwarnings("ignore", module="huggingface_hub")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _stopping_at_signals() -> Iterator[None]:
    """Lets SIGINT and SIGTERM stop the library's threads, which would otherwise read their files to the end. SIGTERM
    needs a handler, since by default it does nothing to the first process of a container."""
    if current_thread() is not main_thread():
        yield
        return
    # A thread that waits for the network does not call its bar.
    deadline = Timer(STOP_SECONDS, os._exit, (130,))
    deadline.daemon = True

    def stop(number: int, frame: FrameType | None) -> None:
        if not _stopped.is_set():
            _stopped.set()
            deadline.start()
        raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
        deadline.cancel()
        _stopped.clear()
