"""Runs a program's script against a server, and asks the server the same with a plain request.

A script is what a user of the program would write. It knows the server under ADDRESS and KEY, which are replaced when
it runs, gets the part to do as its argument, and prints a line of JSON, [name, result], for each thing that it did.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.serving import ROOT, RunningServer, running_server

from .environments import Program

NANO = ROOT / "models" / "nano"
ADDRESS = "127.0.0.1:8000"
KEY = "the-key-of-your-server"
RECIPE: dict[str, Any] = {"model": "nano", "prompt": "def f(", "max_tokens": 16, "temperature": 0.0}
"""What the recipe of each program asks."""
ASKED: dict[str, Any] = {"model": "nano", "prompt": "# naïve\nimport ", "max_tokens": 40, "temperature": 0.8, "seed": 7}
"""What scripts ask besides; they read it from their standard input."""
PROGRAMS = Path(__file__).with_name("programs")
RECIPES = {path.stem: path for path in sorted(Path(__file__).with_name("recipes").iterdir())}
SECONDS = 180


def plain(server: RunningServer, **fields: Any) -> dict[str, Any]:
    """The answer to an ordinary request without a client library, for comparison."""
    told = post(server, **fields)
    assert told.status_code == 200, told.text
    answer: dict[str, Any] = told.json()
    return answer


def texts(server: RunningServer, **fields: Any) -> list[str]:
    return [choice["text"] for choice in plain(server, **fields)["choices"]]


def post(server: RunningServer, **fields: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {KEY}"}
    return httpx.post(f"{server.url}/v1/completions", json=fields or RECIPE, headers=headers, timeout=SECONDS)


def run(program: Program, script: str, part: str, server: RunningServer, folder: Path) -> dict[str, Any]:
    """What a file of `programs` tells about its part, by name."""
    path = written(PROGRAMS / script, server, program, folder)
    told = output([*program.command(path), part], folder, json.dumps(ASKED))
    return dict(json.loads(line) for line in told.splitlines() if line.startswith("["))


def run_recipe(program: Program, recipe: Path, server: RunningServer, folder: Path) -> str:
    """What it prints, without the end of the last line."""
    path = written(recipe, server, program, folder)
    command = ["sh", "-eu", str(path)] if recipe.suffix == ".sh" else program.command(path)
    return output(command, folder, path=f"{program.tool('x').parent}{os.pathsep}").removesuffix("\n")


def written(source: Path, server: RunningServer, program: Program, folder: Path) -> Path:
    """A script for this server, where it finds its program."""
    path = folder / f"run-{source.name}"
    path.write_text(source.read_text().replace(ADDRESS, server.url.removeprefix("http://")))
    if program.installer == "npm" and not (folder / "node_modules").exists():
        (folder / "node_modules").symlink_to(program.folder / "node_modules")
    return path


def output(command: list[str], folder: Path, text: str = "", path: str = "") -> str:
    done = subprocess.run(
        command,
        input=text,
        cwd=folder,
        env=environment(folder) | {"PATH": path + os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment(folder: Path) -> dict[str, str]:
    """That of a user who is offline and has just come: no settings, caches or keys from elsewhere."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "TMPDIR")}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    return kept | offline | {"HOME": str(folder), "PYTHONUTF8": "1"}


@contextmanager
def busy(server: RunningServer, refusals: int) -> Iterator[None]:
    """The queue of a server with --max-queue 1 is full until it has refused this many requests. Then all goes on."""
    before = refused(server)
    with paused(server):
        with ThreadPoolExecutor() as threads:
            # One that waits, and one that is refused, by which one can tell that the other does.
            first = [threads.submit(post, server) for _ in range(2)]
            wait(first, return_when=FIRST_COMPLETED)
            releasing = threads.submit(_await, lambda: refused(server) >= before + 1 + refusals)
            releasing.add_done_callback(lambda _: resume(server))
            yield
            releasing.result()
        assert sorted(answer.result().status_code for answer in first) == [200, 429]


@contextmanager
def draining(folder: Path) -> Iterator[RunningServer]:
    """A server that has been told to end and still has a request to finish."""
    with running_server(NANO, folder / "log", "--api-keys", KEY) as server, ThreadPoolExecutor() as threads:
        with paused(server):
            running = threads.submit(post, server)
            _await(lambda: server.metrics("fastblt_http_requests_in_progress")["fastblt_http_requests_in_progress"] > 1)
            server.terminate()
            _await(lambda: server.metrics("fastblt_draining")["fastblt_draining"] == 1)
            yield server
        assert running.result().status_code == 200
    assert server.process.returncode == 0


@contextmanager
def paused(server: RunningServer) -> Iterator[None]:
    """The server answers, and its engine stands still."""
    os.kill(_engine(server), signal.SIGSTOP)
    try:
        yield
    finally:
        resume(server)


def resume(server: RunningServer) -> None:
    os.kill(_engine(server), signal.SIGCONT)


def _engine(server: RunningServer) -> int:
    pid = server.process.pid
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def refused(server: RunningServer) -> float:
    """How many requests have been answered with 429."""
    return sum(server.metrics('fastblt_http_responses_total{route="/v1/completions",status="429"}').values())


def _await(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
