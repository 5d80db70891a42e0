"""Servers for these tests; one is shared by all that do not hurt it."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from engine.checkpoint import PRESETS, calibrated, random_tensors, save
from tests.serving import API_KEYS, RunningServer, StartServer, running_server


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    tensors = random_tensors(PRESETS["tiny"], seed=1)
    save(path, calibrated(PRESETS["tiny"], tensors), tensors)
    return path


@pytest.fixture(scope="session")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tiny_model, tmp_path_factory.mktemp("server") / "log") as running:
        yield running


@pytest.fixture(scope="session")
def keyed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """It has the two API keys."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTBLT_API_KEYS", ",".join(API_KEYS))
        with running_server(tiny_model, tmp_path_factory.mktemp("keyed") / "log") as running:
            # No process that starts later has them.
            patch.undo()
            yield running


@pytest.fixture
def start_server(tiny_model: Path, tmp_path: Path) -> Iterator[StartServer]:
    """Starts one for this test alone, with these flags."""
    with ExitStack() as stack:
        yield lambda *flags: stack.enter_context(running_server(tiny_model, tmp_path / "log", *flags))


@pytest.fixture
def levels() -> Iterator[None]:
    """Log levels of this process are restored."""
    before = {name: logging.getLogger(name).level for name in ("root", "fastblt")}
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)
