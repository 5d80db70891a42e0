"""A real Ray cluster on this machine, and `python -m deploy.ray_serve` on it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from tests.serving import ROOT

NANO = ROOT / "models" / "nano"
PROMPTS = [f"{number:03} = " for number in range(100)]
LONG = {"max_tokens": 6000, "temperature": 0, "ignore_eos": True}
"""Takes long enough to be in the middle of it."""
KEY = "a-secret-of-these-tests"
SECONDS = 120
"""Within which everything that is waited for must have come, on a busy machine too."""


def clean_environment(home: Path) -> dict[str, str]:
    """With a home folder of its own and without what Ray is told on this machine: Ray leaves a token in the one, and
    looks for it in both."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        # Reports to the autoscaler; by default every ten seconds.
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    }


def until(condition: Callable[[], Any], what: str = "") -> Any:
    """Waits for it to be true, and returns it."""
    deadline = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, f"still waiting for: {what or condition}"
        time.sleep(0.1)
    return found


def alive(pid: int) -> bool:
    """Whether the process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Cluster(NamedTuple):
    address: str
    environment: dict[str, str]
    """Of whoever joins it."""


@contextmanager
def running_cluster(environment: dict[str, str] | None = None) -> Iterator[Cluster]:
    """Of two cores and a small object store. By default its home folder is its own and empty, so it has no token."""
    # Sockets lie in it, and their paths must be short.
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    environment = environment or clean_environment(folder)
    port, *others = free_ports(4)
    flags = [f"--port={port}", "--num-cpus=2", "--object-store-memory=100000000", f"--temp-dir={folder}"]
    flags += ["--include-dashboard=false", f"--ray-client-server-port={others[0]}"]
    flags += [f"--dashboard-agent-listen-port={others[1]}", f"--metrics-export-port={others[2]}"]
    log = folder / "start.log"
    with (
        log.open("wb") as out,
        subprocess.Popen(
            [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--disable-usage-stats", *flags],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
        ) as process,
    ):
        try:
            until(lambda: "--block" in log.read_text() or process.poll() is not None, "the cluster")
            assert process.poll() is None, log.read_text()
            yield Cluster(f"127.0.0.1:{port}", environment)
        finally:
            process.terminate()
            try:
                process.wait(60)
            finally:
                process.kill()
    shutil.rmtree(folder)


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Replica(NamedTuple):
    """As `/replicas` tells of it."""

    id: str
    pid: int
    engine_pid: int
    """0 while there is none."""
    engine: str


class Application(NamedTuple):
    process: subprocess.Popen[bytes]
    url: str
    key: str
    log: Path

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=SECONDS, headers={"authorization": f"Bearer {self.key}"})

    def get(self, path: str) -> httpx.Response:
        with self.http() as http:
            return http.get(path)

    def complete(self, **fields: Any) -> httpx.Response:
        with self.http() as http:
            return http.post("/v1/completions", json={"model": "nano", **fields})

    def replicas(self) -> list[Replica]:
        found = [target["labels"] for target in self.get("/replicas").json()]
        fields = [{name.removeprefix("__meta_fastblt_"): value for name, value in labels.items()} for labels in found]
        return sorted(Replica(f["replica"], int(f["pid"]), int(f["engine_pid"]), f["engine"]) for f in fields)

    def ready(self, number: int) -> list[Replica]:
        """The replicas, once there are that many and their engines run."""

        def found() -> list[Replica]:
            replicas = self.replicas()
            return replicas if len(replicas) == number == sum(r.engine == "ready" for r in replicas) else []

        return until(found, f"{number} replicas")

    def in_progress(self, replica: Replica) -> float:
        """Requests that it has."""
        return self.metric(replica.id, "fastblt_http_requests_in_progress") - 1

    def not_ready(self) -> httpx.Response | None:
        """What says so, if it is not."""
        answer = self.get("/health/ready")
        return None if answer.is_success else answer

    def metric(self, replica: str, name: str) -> float:
        """The sum over its labels."""
        lines = self.get(f"/replicas/{replica}/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


@contextmanager
def running_application(
    cluster: Cluster, model: Path, log: Path, *flags: str, through: Sequence[str] = ()
) -> Iterator[Application]:
    """With an engine thread each, so that two find room beside each other. It ends in time when it is told to.

    Its process group is its own, as that of a command in a terminal is; `through` is what it is started by, as `nohup`.
    """
    (port,) = free_ports(1)
    command = [*through, sys.executable, "-m", "deploy.ray_serve", "--model", str(model)]
    command += ["--ray-address", cluster.address, "--port", str(port), "--num-threads", "1"]
    command += ["--replica-cpus", "0.5", "--cache-bytes", str(1 << 26)]
    environment = cluster.environment | {"FASTBLT_API_KEYS": KEY}
    with (
        log.open("wb") as out,
        subprocess.Popen(
            [*command, *flags],
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            process_group=0,
        ) as process,
    ):
        try:
            until(lambda: "serving" in log.read_text() or process.poll() is not None, "the application")
            assert process.poll() is None, log.read_text()
            yield Application(process, f"http://127.0.0.1:{port}", KEY, log)
        finally:
            process.terminate()
            try:
                process.wait(SECONDS)
            finally:
                process.kill()
    assert process.returncode == 0, log.read_text()


@contextmanager
def load(application: Application, number: int) -> Iterator[None]:
    """That many requests at a time."""
    enough = threading.Event()
    failed: list[httpx.Response] = []

    def repeat(prompt: str) -> None:
        while not enough.is_set():
            answer = application.complete(prompt=prompt, max_tokens=20, ignore_eos=True)
            if not answer.is_success:
                failed.append(answer)

    threads = [threading.Thread(target=repeat, args=(f"{one} ",)) for one in range(number)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        enough.set()
        for thread in threads:
            thread.join()
    assert not failed


class Stream:
    """A streamed completion, read by a thread of its own from now on."""

    def __init__(self, application: Application, **fields: Any) -> None:
        self.fields = fields
        self.status = 0
        self.arrivals: list[float] = []
        """Seconds after the request, for each event."""
        self.events: list[dict[str, Any]] = []
        self.done = False
        self._application = application
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        body = {"model": "nano", "stream": True, **self.fields}
        with (
            suppress(httpx.RemoteProtocolError),
            self._application.http() as http,
            http.stream("POST", "/v1/completions", json=body) as answer,
        ):
            self.status = answer.status_code
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    self.done = True
                elif line.startswith("data: "):
                    self.arrivals.append(time.monotonic() - self._began)
                    self.events.append(json.loads(line.removeprefix("data: ")))

    def begun(self, number: int = 2) -> None:
        """Waits for that many events."""
        until(lambda: len(self.events) >= number or not self._thread.is_alive(), "a stream")
        assert len(self.events) >= number

    def wait(self, seconds: float = SECONDS) -> None:
        """For its end, or for the connection's."""
        self._thread.join(seconds)
        assert not self._thread.is_alive()

    def join(self, seconds: float = SECONDS) -> "Stream":
        self.wait(seconds)
        assert self.status == 200 and self.done
        return self

    @property
    def text(self) -> str:
        return "".join(choice["text"] for event in self.events for choice in event.get("choices", []))

    @property
    def choices(self) -> dict[int, tuple[str, list[Any]]]:
        """Text and log-probabilities of each."""
        said: dict[int, tuple[str, list[Any]]] = {}
        for event in self.events:
            for choice in event.get("choices", []):
                text, scores = said.get(choice["index"], ("", []))
                new = list(zip(*(choice["logprobs"] or {}).values(), strict=True))
                said[choice["index"]] = text + choice["text"], scores + new
        return said

    @property
    def finish_reason(self) -> str | None:
        return self.events[-1]["choices"][0]["finish_reason"] if "choices" in self.events[-1] else None

    @property
    def error(self) -> str | None:
        """The code of the error that ended it."""
        return self.events[-1].get("error", {}).get("code")
