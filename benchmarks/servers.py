"""A server in its own process, and a minimal streaming client."""

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from .report import ROOT

NAME = "benchmarked"
START_SECONDS = 120
USAGE_BYTES = 4096
"""Bytes at the end of a stream that always hold its usage."""


@contextmanager
def server(model: Path, *flags: str, root: Path = ROOT) -> Iterator[str]:
    """The address of `fastblt serve`, of the checkout in `root`, on a free port; it is stopped afterwards."""
    command = [sys.executable, "-m", "server", "serve", "--model", str(model.resolve()), "--port", "0"]
    with _running([*command, "--served-model-name", NAME, *flags], root) as address:
        yield address


@contextmanager
def ray_server(model: Path, *flags: str, root: Path = ROOT, module: str = "deploy.ray_serve") -> Iterator[str]:
    """The same through Ray, on a cluster of its own. module: what is run."""
    from tests.ops.ray_cluster import clean_environment, free_ports, running_cluster

    with TemporaryDirectory(prefix="benchmarks-") as home:
        environment = clean_environment(Path(home)) | {"PYTHONPATH": str(root)}
        with running_cluster(environment) as cluster:
            command = [sys.executable, "-m", module, "--model", str(model.resolve())]
            command += ["--ray-address", cluster.address, "--port", str(free_ports(1)[0])]
            with _running([*command, "--served-model-name", NAME, *flags], root, environment) as address:
                yield address


@contextmanager
def _running(command: list[str], root: Path, environment: dict[str, str] | None = None) -> Iterator[str]:
    """The address that a server's log tells; the server is stopped afterwards."""
    with TemporaryDirectory(prefix="benchmarks-") as folder:
        log = Path(folder) / "log"
        with (
            log.open("w") as out,
            subprocess.Popen(command, cwd=root, stdout=out, stderr=subprocess.STDOUT, env=environment) as process,
        ):
            try:
                yield _address(process, log)
            finally:
                process.terminate()
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()


def commit_of(folder: Path) -> str:
    """The commit of a checkout."""
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def _address(process: "subprocess.Popen[bytes]", log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(r" on (http://[\w.:\[\]]+).*\n", log.read_text()):
            return found[1]
        time.sleep(0.005)
    raise RuntimeError(f"the server did not start:\n{log.read_text()}")


@dataclass(frozen=True, slots=True)
class Stream:
    """Seconds from the request to its first event and to its end, and the bytes generated."""

    first: float
    last: float
    tokens: int


async def stream(address: str, body: dict[str, Any]) -> Stream:
    """One streamed completion. Events are counted, not parsed: the client must not limit the figures."""
    where = urlsplit(address)
    content = json.dumps({"model": NAME, **body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    try:
        writer.write(head.encode() + content)
        first, tail = 0.0, b""
        while chunk := await reader.read(1 << 16):
            tail = tail[-USAGE_BYTES:] + chunk
            if not first and b"data:" in tail:
                first = time.perf_counter()
    finally:
        writer.close()
    usage = re.findall(rb'"completion_tokens":(\d+)', tail)
    if not usage or b"[DONE]" not in tail:
        raise RuntimeError(f"not a whole stream: {tail[-500:]!r}")
    return Stream(first - began, time.perf_counter() - began, int(usage[-1]))


async def streams(address: str, bodies: Sequence[dict[str, Any]]) -> list[Stream]:
    """Runs all of them at the same time."""
    return list(await asyncio.gather(*(stream(address, body) for body in bodies)))
