"""The server is told to end: at its start, under load, over a frozen engine; its exit codes (docs/operations.md)."""

import asyncio
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.faults.asking import (
    LATE,
    NANO,
    Answer,
    ask,
    child_engine,
    engine_of,
    kill,
    mixed,
    new_engine,
    plain,
    send,
    serving,
    talking,
    under_way,
    until,
)
from tests.raw_http import connected, post
from tests.serving import ROOT, RunningServer


async def ended(server: RunningServer, engine: int | None, seconds: float) -> int:
    """The exit code; the engine has ended, too."""
    code = await asyncio.to_thread(server.process.wait, seconds)
    assert not Path(f"/proc/{engine}").exists()
    return code


@contextmanager
def started(folder: Path, *flags: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server that may not come up."""
    command = [sys.executable, "-m", "server", "serve", "--model", str(NANO), "--port", "0", "--num-threads", "1"]
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen([*command, *flags], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def wait_for(log: Path, text: str) -> None:
    deadline = time.monotonic() + 60
    while text not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


@pytest.mark.faults
async def test_sigterm_lets_streams_finish(tmp_path: Path) -> None:
    requests = mixed(16, seed=61)
    async with under_way(tmp_path, requests) as streams:
        server = streams.server
        engine = engine_of(server)
        server.terminate()
        await streams.check()
        assert await ended(server, engine, 5 + LATE) == 0


@pytest.mark.faults
@pytest.mark.parametrize("case", ["drain", "twice", "frozen"])
async def test_sigterm_cuts_off_what_does_not_finish(tmp_path: Path, case: str) -> None:
    """After `--drain-seconds`, or at once after a second signal; also over a frozen engine."""
    drain = 20.0 if case == "twice" else 1.0
    with serving(tmp_path, "--drain-seconds", str(drain)) as server:
        engine = engine_of(server)
        async with talking(server) as http:
            answers = [Answer() for _ in range(8)]
            asked = asyncio.gather(*(ask(http, plain(n, 6000), answers[n]) for n in range(8)), return_exceptions=True)
            await until(lambda: all(answer.times for answer in answers))
            if case == "frozen":
                send(engine, signal.SIGSTOP)
            began = time.monotonic()
            server.terminate()
            if case == "twice":
                await asyncio.sleep(0.3)
                server.terminate()
            outcomes = await asked
            took = time.monotonic() - began
            if case != "twice":
                # A second signal may close connections before all is sent.
                assert {answer.error.get("code") for answer in answers} == {"engine_dead"}, outcomes
            assert took < (0.3 if case == "twice" else drain) + 6 + LATE
        assert await ended(server, engine, 6 + LATE) == 0


@pytest.mark.faults
@pytest.mark.parametrize("drain", [60, 0.5])
async def test_sigterm_while_another_engine_loads(tmp_path: Path, drain: float) -> None:
    """The engine was killed: streams still finish if there is time, and are cut off if there is none."""
    requests = mixed(16, seed=62)
    async with under_way(tmp_path, requests, "--drain-seconds", str(drain)) as streams:
        server, answers = streams.server, streams.answers
        engine = await new_engine(server, kill(server))
        await asyncio.sleep(0.3)
        server.terminate()
        if drain > 1:
            await streams.check()
        else:
            codes = {answer.error.get("code") for answer in await answers}
            assert codes <= {None, "engine_dead"} and "engine_dead" in codes
        assert await ended(server, engine, 6 + LATE) == 0


@pytest.mark.faults
async def test_sigterm_does_not_wait_for_stalled_readers(tmp_path: Path) -> None:
    with serving(tmp_path, "--drain-seconds", "1") as server:
        port = httpx.URL(server.url).port
        assert port
        engine, stalled = engine_of(server), []
        for number in range(8):
            context = connected(port, limit=1024)
            raw = await context.__aenter__()
            raw.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await raw.send(post(plain(number, 6000, logprobs=5)))
            stalled.append(context)
        await asyncio.sleep(1)
        server.terminate()
        assert await ended(server, engine, 1 + 5 + 5 + LATE) == 0
        for context in stalled:
            await context.__aexit__(None, None, None)


@pytest.mark.faults
@pytest.mark.parametrize("line", ["fastblt 0.", "takes", "calibrated"])
def test_sigterm_while_the_model_loads_ends_with_0(tmp_path: Path, line: str) -> None:
    """At once after that line of the log."""
    with started(tmp_path) as process:
        wait_for(tmp_path / "log", line)
        process.terminate()
        assert process.wait(5 + LATE) == 0
        assert "serving" not in (tmp_path / "log").read_text()


@pytest.mark.faults
def test_an_engine_killed_at_the_first_start_ends_the_server_with_1(tmp_path: Path) -> None:
    with started(tmp_path) as process:
        wait_for(tmp_path / "log", "takes")
        send(child_engine(process.pid), signal.SIGKILL)
        assert process.wait(5 + LATE) == 1
    assert "was killed (SIGKILL; out of memory?) while it was loading" in (tmp_path / "log").read_text()


@pytest.mark.faults
@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        (["--model", "no/such/folder"], 1, "no/such/folder"),
        (["--port", "PORT"], 1, "cannot listen on port"),
        (["--max-queue", "0"], 2, "--max-queue"),
        (["--no-such-flag"], 2, "--no-such-flag"),
    ],
)
def test_exit_codes_of_a_server_that_cannot_start(tmp_path: Path, flags: list[str], code: int, told: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        flags = [flag.replace("PORT", str(taken.getsockname()[1])) for flag in flags]
        with started(tmp_path, *flags) as process:
            assert process.wait(30) == code
    assert told in (tmp_path / "log").read_text()


def test_sigterm_before_the_first_line_of_the_log_ends_at_once(tmp_path: Path) -> None:
    with started(tmp_path) as process:
        time.sleep(0.1)
        process.terminate()
        assert process.wait(LATE) == -signal.SIGTERM
    assert not (tmp_path / "log").read_text()
