"""A server in a process of its own, with a real engine over a tiny random model."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx

from engine.decoders import DECODERS

ROOT = Path(__file__).parents[1]
START_SECONDS = 60
API_KEYS = ("the-key-of-client-one", "the-key-of-client-two")
TINY_NAMES = ["tiny", *(f"tiny:{decoder}" for decoder in DECODERS)]
"""What a server offers of the preset."""


class RunningServer(NamedTuple):
    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def client(self, **options: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)  # type: ignore[arg-type]

    def terminate(self) -> None:
        os.kill(self.process.pid, signal.SIGTERM)

    def kill_children(self) -> None:
        """Its engine's process, before a text that takes a fraction of a second has ended."""
        for children in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            for pid in children.read_text().split():
                os.kill(int(pid), signal.SIGKILL)

    def pages_in_use(self) -> float:
        return sum(self.metrics("fastblt_pages_used").values())

    def metrics(self, name: str) -> dict[str, float]:
        with self.client() as http:
            lines = http.get("/metrics").text.splitlines()
        return {key: float(value) for key, value in (line.rsplit(" ", 1) for line in lines if line.startswith(name))}

    def aborted(self) -> float:
        """Sequences that ended because their client left."""
        return sum(n for key, n in self.metrics("fastblt_sequences_total").items() if 'finish_reason="abort"' in key)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


StartServer = Callable[..., RunningServer]


@contextmanager
def running_server(
    model: Path, log: Path, *flags: str, program: str = "server", prefix: Sequence[str] = ()
) -> Iterator[RunningServer]:
    """program: a module that is `fastblt`. prefix: a command that runs the rest as its arguments."""
    command = [*prefix, sys.executable, "-m", program, "serve", "--model", str(model), "--port", "0"]
    with (
        log.open("wb") as out,
        subprocess.Popen(
            [*command, "--num-threads", "1", "--cache-bytes", str(1 << 26), *flags],
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            yield RunningServer(process, _await_url(process, log), log)
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(20)
                finally:
                    process.kill()


def _await_url(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(r" on (http://[\w.:\[\]]+).*\n", log.read_text()):
            return found[1]
        time.sleep(0.05)
    raise AssertionError(f"the server did not start:\n{log.read_text()}")
