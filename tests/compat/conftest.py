"""What the tests of compatibility share. `make test-compat` runs them; `make test` leaves them out."""

from collections.abc import Iterator

import pytest

from tests.serving import RunningServer, running_server

from .running import KEY, NANO


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    flags = ["--api-keys", KEY, "--metric-aliases", "vllm"]
    with running_server(NANO, tmp_path_factory.mktemp("log") / "log", *flags) as server:
        yield server


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server on which one request at a time may wait."""
    flags = ["--api-keys", KEY, "--max-queue", "1", "--max-choices", "1"]
    with running_server(NANO, tmp_path_factory.mktemp("log") / "log", *flags) as server:
        yield server
