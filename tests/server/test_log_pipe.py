"""A server that logs content, into a pipe that is read, and then no more: `fastblt serve 2>&1 | sleep 1000`."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.process.log_writer import LIMIT_BYTES
from tests.serving import ROOT

PIPE_BYTES = 1 << 16
ROUTE_SECONDS = 5
"""Within which a route must answer, on a machine that does other things, too."""
CONTENT_BYTES = 8 * 1000 * len(r"\u0000\\x00")
"""Least length of the line about a request for as many prompts of as many zeros: it has each as a field and in its
message."""


@pytest.fixture(scope="module")
def piped(tiny_model: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server and its address. Only tests read what its log says after that."""
    flags = ["--model", str(tiny_model), "--port", "0", "--num-threads", "1", "--cache-bytes", str(1 << 26)]
    logs = ["--log-format", "json", "--log-level", "debug", "--log-content"]
    with subprocess.Popen(
        [sys.executable, "-m", "server", "serve", *flags, *logs], cwd=ROOT, stderr=subprocess.PIPE
    ) as process:
        try:
            assert process.stderr
            while not (found := re.search(rb" on (http://[\w.:]+)", line := process.stderr.readline())):
                assert line, "the server did not start"
            yield process, found[1].decode()
        finally:
            process.kill()


def say(http: httpx.Client, num_lines: int) -> None:
    """Requests whose lines are long."""
    for _ in range(num_lines):
        asked = {"model": "tiny", "prompt": ["\0" * 1000] * 8, "max_tokens": 1}
        assert http.post("/v1/completions", json=asked).status_code == 200


def test_content_is_logged_when_log_content_is_set(piped: tuple[subprocess.Popen[bytes], str]) -> None:
    process, url = piped
    mark = "Zq7content"

    def logged(request_id: str, **fields: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The line about the content of a request, and the answer."""
        asked = {"model": "tiny", "ignore_eos": True, **fields}
        answer = httpx.post(f"{url}/v1/completions", json=asked, headers={"x-request-id": request_id}, timeout=60)
        assert process.stderr
        while (line := json.loads(process.stderr.readline()))["logger"] != "fastblt.content":
            pass
        assert line["request_id"] == request_id
        return line, answer.json()

    short, answer = logged("r-short", prompt=f"{mark} ", max_tokens=8, seed=1)
    assert (short["prompt_texts"], short["completion_texts"]) == ([f"{mark} "], [answer["choices"][0]["text"]])
    long, _ = logged("r-long", prompt=[f"{mark}{'x' * 3000}"] * 9, max_tokens=1)
    assert len(long["prompt_texts"]) == len(long["completion_texts"]) == 8
    assert all(prompt == f"{mark}{'x' * (1000 - len(mark))}..." for prompt in long["prompt_texts"])


def test_an_unread_log_pipe_blocks_neither_routes_nor_shutdown(piped: tuple[subprocess.Popen[bytes], str]) -> None:
    process, url = piped
    log = process.stderr
    assert log
    with httpx.Client(base_url=url, timeout=ROUTE_SECONDS) as http:
        say(http, (LIMIT_BYTES + PIPE_BYTES) // CONTENT_BYTES + 2)
        for path in ("/health/live", "/health/ready", "/version", "/v1/models"):
            assert http.get(path).status_code == 200
        metrics = http.get("/metrics").text
        counts = dict(re.findall(r'^fastblt_log_lines_dropped_total{process="(.+)"} (.+)$', metrics, re.M))
        assert float(counts["server"]) > 0 and float(counts["engine"]) == 0

        lines = [json.loads(log.readline())]
        while lines[-1]["logger"] != "fastblt.logs":
            lines.append(json.loads(log.readline()))
        assert lines[-1]["dropped_lines"] >= float(counts["server"])
        assert sum(line["logger"] == "fastblt.content" for line in lines) > LIMIT_BYTES / 2 / CONTENT_BYTES
        http.get("/version", headers={"x-request-id": "again"})
        while json.loads(log.readline())["request_id"] != "again":
            pass

        say(http, PIPE_BYTES // CONTENT_BYTES + 2)
    began = time.monotonic()
    process.terminate()
    assert process.wait(20) == 0
    assert time.monotonic() - began < 10
