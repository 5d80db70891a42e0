"""How a server starts and ends."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from typer.testing import CliRunner

from server.app import create_app
from server.cli import app as cli
from server.http import bind
from server.lifecycle import HttpServer
from server.settings import ServerSettings
from tests.scripted_server import ScriptedClient, until
from tests.serving import ROOT, RunningServer, StartServer

LONG = {"model": "tiny", "prompt": "a", "max_tokens": 1000, "ignore_eos": True, "stream": True, "seed": 1}


def test_sigterm_lets_streams_finish_and_refuses_new_requests(start_server: StartServer) -> None:
    running = start_server()
    with (
        running.client() as http,
        running.client() as other,
        http.stream("POST", "/v1/completions", json=LONG) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        running.terminate()
        until_draining(other)
        refused = other.post("/v1/completions", json={"model": "tiny", "prompt": "b"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        assert "retry-after" in refused.headers
        assert other.get("/health/live").status_code == 200
        data = [json.loads(line[6:]) for line in lines if line and line != "data: [DONE]"]
    assert data[-1]["choices"][0]["finish_reason"] == "length"
    assert running.process.wait(10) == 0


def until_draining(http: httpx.Client) -> None:
    deadline = time.monotonic() + 5
    while (ready := http.get("/health/ready")).status_code == 200:
        assert time.monotonic() < deadline
    assert ready.json()["error"]["code"] == "draining"


@pytest.mark.parametrize("second_signal", [False, True])
def test_streams_beyond_the_drain_time_end_with_an_error_event(start_server: StartServer, second_signal: bool) -> None:
    running = start_server("--drain-seconds", "60" if second_signal else "0.02")
    # Many sequences: one alone would end before the server has looked at the signal.
    endless = LONG | {"max_tokens": 4000, "n": 64}
    with (
        running.client() as http,
        running.client() as other,
        http.stream("POST", "/v1/completions", json=endless) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        # A closed terminal ends the server as SIGTERM does.
        running.process.send_signal(signal.SIGHUP if second_signal else signal.SIGTERM)
        if second_signal:
            until_draining(other)
            running.terminate()
        *_, last, done = [line for line in lines if line]
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "service_unavailable"
    assert done == "data: [DONE]"
    assert running.process.wait(10) == 0
    assert "Traceback" not in running.log.read_text()


def serve(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server", "serve", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_a_port_in_use_is_reported_in_one_line(server: RunningServer, tiny_model: Path) -> None:
    port = urlsplit(server.url).port
    ended = serve("--model", str(tiny_model), "--port", str(port))
    assert ended.returncode == 1
    assert (
        ended.stderr.strip() == f"fastblt: cannot listen on port {port} of host 127.0.0.1: the port is already in use"
    )


async def test_the_second_of_two_servers_on_one_port_reports_why_it_ends() -> None:
    chosen = ServerSettings()
    app = create_app(chosen, ScriptedClient())
    first = bind("127.0.0.1", 0)
    # As long as neither listens, both may have the port.
    second = bind("127.0.0.1", first.getsockname()[1])
    servers = [HttpServer(app, chosen, bound, None, "scripted") for bound in (first, second)]
    serving = asyncio.create_task(servers[0].serve())
    await until(lambda: servers[0].started)
    with second, pytest.raises(OSError) as caught:
        await servers[1].serve()
    assert caught.value.strerror == "the port is already in use"
    servers[0].should_exit = True
    await serving


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--api-key-file", "keys"], "--api-key-file keys, line 1: a key has at least 16 characters"),
        (["--api-key-file", "none"], "--api-key-file none: No such file"),
        (["--admin-key-file", "none"], "--admin-key-file none: No such file"),
        (["--api-keys", ""], "holds no API key"),
        (["--ssl-certfile", "keys", "--ssl-keyfile", "keys"], "--ssl-certfile keys and --ssl-keyfile keys: "),
    ],
)
def test_wrong_settings_are_refused_before_the_model_is_loaded(
    tmp_path: Path, flags: list[str], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys").write_text("sk-1 # alice\n")
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(cli, ["serve", "--model", "nothing", *flags])
    assert ended.exit_code in (1, 2) and not ended.stdout and why in " ".join(ended.stderr.split())
    assert "nothing" not in ended.stderr and "sk-1" not in ended.stderr and "Traceback" not in ended.stderr


def test_an_error_at_the_start_says_where_its_value_comes_from(server: RunningServer, tmp_path: Path) -> None:
    port = urlsplit(server.url).port
    (tmp_path / "a.yaml").write_text(f"model: nothing\nport: {port}\nssl-certfile: cert\n")

    def error(*flags: str, **variables: str) -> str:
        command = [sys.executable, "-m", "server", "serve", "--config", "a.yaml", *flags]
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, env=environment)
        assert ended.returncode == 1 and "Traceback" not in ended.stderr
        return ended.stderr.strip().splitlines()[-1]

    key = "ssl-keyfile from the environment variable FASTBLT_SSL_KEYFILE"
    why = "--ssl-certfile cert and --ssl-keyfile key: No such file or directory"
    assert error(FASTBLT_SSL_KEYFILE="key") == f"fastblt: {why} (ssl-certfile from a.yaml, line 3; {key})"
    (tmp_path / "a.yaml").write_text(f"model: ./nothing\nport: {port}\n")
    why = f"cannot listen on port {port} of host 127.0.0.1: the port is already in use"
    assert json.loads(error("--log-format=json"))["message"] == f"{why} (port from a.yaml, line 2)"
    # The port of the file is not used, and not named.
    assert error("--port=0").endswith(" (model from a.yaml, line 1)")


def test_a_model_that_cannot_be_loaded_is_refused_before_the_port_opens(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ended = serve("--model", str(tmp_path / "nothing"), "--port", str(port))
    assert ended.returncode == 1
    assert "nothing" in ended.stderr and "serving" not in ended.stderr
    assert "Traceback" not in ended.stderr
