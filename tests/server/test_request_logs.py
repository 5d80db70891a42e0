"""What a served request leaves in the log, and what it never does."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.logs import FormatName
from tests.serving import ROOT, RunningServer, running_server

MARK, KEY = "Zq7content", "Zq7key-of-this-test"
"""Whatever has these in it must not be logged."""
WAIT_SECONDS = 20


def ask(http: httpx.Client, request_id: str, **fields: Any) -> httpx.Response:
    asked = {
        "model": "tiny",
        "prompt": f"{MARK} ",
        "stop": f"{MARK}?",
        "user": MARK,
        "cache_salt": MARK,
        "ignore_eos": True,
    }
    headers = {"x-request-id": request_id}
    return http.post("/v1/completions", json=asked | {"max_tokens": 8} | fields, headers=headers)


def until_logged(server: RunningServer, text: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while text not in server.log.read_text():
        assert time.monotonic() < deadline, server.log.read_text()
        time.sleep(0.02)


def leave(server: RunningServer, request_id: str, stream: bool) -> None:
    """Asks for more than anybody waits for."""
    with server.client(headers={"authorization": f"Bearer {KEY}"}) as http, suppress(httpx.ReadTimeout):
        body = {"model": "tiny", "prompt": MARK, "max_tokens": 4000, "ignore_eos": True, "stream": stream}
        headers = {"x-request-id": request_id}
        # Shorter than the whole text takes.
        patience = 2 if stream else 0.05
        with http.stream("POST", "/v1/completions", json=body, headers=headers, timeout=patience) as response:
            for number, _ in enumerate(response.iter_lines()):
                if number == 4:
                    break
    until_logged(server, request_id)


def talk(server: RunningServer) -> None:
    """All that can go right and wrong, with the mark wherever a client can put it."""
    with server.client(headers={"authorization": f"Bearer {KEY}"}) as http:
        assert ask(http, "r-plain", model="tiny:blt-s", echo=True).json()["choices"][0]["text"].startswith(MARK)
        assert ask(http, "r-stream", stream=True, n=2, prompt=[MARK, "b"]).text.endswith("[DONE]\n\n")
        # The last block would reach too far.
        assert ask(http, "r-refused", decoder="blt-d", max_tokens=4096 - len(MARK) - 2).status_code == 400
        wrong: list[dict[str, Any]] = [
            {"prompt": {MARK: MARK}},
            {"temperature": MARK},
            {"model": MARK},
            {MARK: 1},
            {"logit_bias": {MARK: 1}},
            {"logit_bias": {"5": MARK}},
            {"unmask": {"rule": MARK}},
            {"stop": [MARK] * 65},
            {"suffix": MARK},
            {"cache_salt": MARK * 99},
            {"decoder": MARK},
            {"stream_options": {MARK: 1}},
        ]
        for number, fields in enumerate(wrong):
            assert ask(http, f"r-wrong-{number}", **fields).status_code in (400, 404)
        for body in (f'{{"prompt": "{MARK}', f'["{MARK}"]', f'{{"prompt": "{MARK}\\ud800"}}', f"{MARK}\xff"):
            headers = {"content-type": "application/json"}
            assert http.post("/v1/completions", content=body.encode("latin-1"), headers=headers).status_code == 400
        assert http.get("/v1/models", params={"key": MARK}, headers={"x-api-key": MARK}).status_code == 200
        assert http.get("/health/ready").status_code == 200
        for wrong_key in (f"Bearer {MARK}", f"Basic {MARK}", MARK):
            headers = {"authorization": wrong_key, "x-request-id": "r-key"}
            refused = http.post("/v1/completions", json={}, headers=headers)
            assert refused.status_code == 401
        leave(server, "r-left", stream=True)
        leave(server, "r-hung-up", stream=False)
        with http.stream(
            "POST",
            "/v1/completions",
            json={"model": "tiny", "prompt": MARK, "max_tokens": 2000, "ignore_eos": True, "stream": True},
            headers={"x-request-id": "r-crash"},
        ) as response:
            events = response.iter_lines()
            next(events)
            server.kill_children()
            assert [event for event in events if event][-1] == "data: [DONE]"
    server.terminate()
    assert server.process.wait(WAIT_SECONDS) == 0


@pytest.fixture(scope="module")
def logged(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[FormatName, str]]:
    """What two servers logged of the same talk, at debug level."""
    found: dict[FormatName, str] = {}
    for format in ("human", "json"):
        log = tmp_path_factory.mktemp(format) / "log"
        flags = ["--log-format", format, "--log-level", "debug", "--api-keys", KEY]
        with running_server(tiny_model, log, *flags) as server:
            talk(server)
        found[format] = log.read_text()
    yield found


@pytest.fixture(scope="module")
def entries(logged: dict[FormatName, str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in logged["json"].splitlines()]


def access(entries: list[dict[str, Any]], request_id: str) -> dict[str, Any]:
    (entry,) = [e for e in entries if e["logger"] == "fastblt.access" and e["request_id"] == request_id]
    return entry


@pytest.mark.parametrize("format", ["human", "json"])
def test_logs_contain_neither_content_nor_api_keys(logged: dict[FormatName, str], format: FormatName) -> None:
    assert "r-plain" in logged[format] and "r-wrong-3" in logged[format] and "401" in logged[format]
    assert MARK not in logged[format] and KEY not in logged[format]


def test_every_log_line_has_process_time_and_level(entries: list[dict[str, Any]]) -> None:
    for entry in entries:
        assert {"time", "level", "process", "pid", "logger", "message"} <= entry.keys()
        assert entry["level"] in ("debug", "info", "warning", "error")
        in_engine = entry["logger"] in ("fastblt.engine", "fastblt.engine.process")
        assert entry["process"] == ("engine" if in_engine else "server")
    assert {entry["process"] for entry in entries} == {"server", "engine"}


def test_the_access_line_of_a_completion_reports_its_cost(entries: list[dict[str, Any]]) -> None:
    entry = access(entries, "r-plain")
    assert entry["level"] == "info" and entry["message"].startswith("127.0.0.1 POST /v1/completions 200 in ")
    wanted = {
        "client": "127.0.0.1",
        "method": "POST",
        "path": "/v1/completions",
        "route": "/v1/completions",
        "status": 200,
        "model": "tiny:blt-s",
        "decoder": "blt-s",
        "stream": False,
        "prompts": 1,
        "sequences": 1,
        "prompt_bytes": len(MARK) + 2,
        "completion_bytes": 8,
        "finish_reasons": ["length"],
        "preemptions": 0,
    }
    assert entry | wanted == entry
    assert 0 < entry["first_byte_seconds"] < entry["duration_seconds"] < WAIT_SECONDS
    assert 0 <= entry["queue_seconds"] < entry["first_byte_seconds"]
    assert entry["decoder_calls"] >= entry["global_calls"] > 0
    assert entry["bytes_read"] > 0 < entry["estimated_bytes"]
    assert entry["completion_id"].startswith("cmpl-")
    assert "error" not in entry and "client_left" not in entry


def test_the_access_line_of_a_stream_is_written_when_it_ends(entries: list[dict[str, Any]]) -> None:
    entry = access(entries, "r-stream")
    wanted = {"stream": True, "status": 200, "prompts": 2, "sequences": 4, "completion_bytes": 32}
    assert entry | wanted == entry
    assert entry["finish_reasons"] == ["length"] * 4
    assert "tiny:blt streamed" in entry["message"] and "4x length" in entry["message"]


def test_the_access_line_marks_a_client_that_disconnected(entries: list[dict[str, Any]]) -> None:
    left, hung_up = access(entries, "r-left"), access(entries, "r-hung-up")
    assert (left["status"], hung_up["status"]) == (200, 499)
    for entry in (left, hung_up):
        assert entry["client_left"] is True and entry["finish_reasons"] == [None]
        assert 0 < entry["completion_bytes"] < 4000
        assert "decoder_calls" not in entry
        assert "the client left" in entry["message"]


def test_the_access_line_of_an_error_has_its_code_and_field(entries: list[dict[str, Any]]) -> None:
    told = {number: access(entries, f"r-wrong-{number}") for number in range(12)}
    assert [(entry.get("error"), entry.get("param")) for entry in told.values()] == [
        ("invalid_value", "prompt"),
        ("invalid_value", "temperature"),
        ("model_not_found", "model"),
        ("unknown_parameter", None),
        ("invalid_value", "logit_bias"),
        ("invalid_value", "logit_bias"),
        ("invalid_value", "unmask"),
        ("invalid_value", "stop"),
        ("unsupported_parameter", None),
        ("invalid_value", "cache_salt"),
        ("invalid_value", "decoder"),
        ("unknown_parameter", "stream_options"),
    ]
    keys = [e for e in entries if e["logger"] == "fastblt.access" and e["request_id"] == "r-key"]
    assert [(entry["status"], entry["error"]) for entry in keys] == [(401, "invalid_api_key")] * 3


def test_the_first_log_line_names_the_installed_versions(
    entries: list[dict[str, Any]], logged: dict[FormatName, str], server: RunningServer
) -> None:
    with server.client() as http:
        about = http.get("/version").json()
    names = ("version", "commit", "torch", "triton", "kernels", "instruction_set")
    assert {name: entries[0][name] for name in names} == {name: about[name] for name in names}
    assert (entries[0]["level"], entries[0]["logger"]) == ("info", "fastblt.server")
    told = f"fastblt {about['version']}, commit {about['commit'] or 'unknown'}, torch {about['torch']}, triton "
    assert told in logged["human"].splitlines()[0] and told in entries[0]["message"]


def test_health_probes_are_logged_only_at_debug_level(entries: list[dict[str, Any]], server: RunningServer) -> None:
    assert {e["level"] for e in entries if e.get("path") == "/health/ready"} == {"debug"}
    with server.client() as http:
        for path in ("/health/live", "/health/ready", "/metrics", "/version"):
            assert http.get(path, headers={"x-request-id": f"probe{path.replace('/', '.')}"}).status_code == 200
    until_logged(server, "probe.version")
    assert server.log.read_text().count("probe.") == 1


def test_log_lines_of_the_engine_name_the_request(entries: list[dict[str, Any]]) -> None:
    engine = [entry for entry in entries if entry["logger"] == "fastblt.engine"]
    aborted = {entry["request_id"] for entry in engine if entry["message"].startswith("aborted after ")}
    assert aborted == {"r-left", "r-hung-up"}
    assert access(entries, "r-refused")["error"] == "context_length_exceeded"


def test_an_engine_crash_logs_affected_requests_and_the_restart(entries: list[dict[str, Any]]) -> None:
    crash, back = (entry for entry in entries if entry["logger"] == "fastblt.engine.client")
    loaded = [entry for entry in entries if entry["message"].startswith("loaded tiny in ")]
    assert len(loaded) == 2
    assert crash["level"] == "error"
    assert crash["message"] == (
        f"the engine process {loaded[0]['pid']} was killed (SIGKILL; out of memory?) while it ran r-crash"
    )
    assert (back["level"], back["message"]) == ("warning", "the engine is back; sequences in flight: 1")
    assert crash["time"] < loaded[1]["time"] <= back["time"]
    assert access(entries, "r-crash")["finish_reasons"] == ["length"]


def test_human_log_lines_have_columns_and_no_colour_in_a_file(logged: dict[FormatName, str]) -> None:
    assert "\x1b" not in logged["human"]
    (line,) = [line for line in logged["human"].splitlines() if line.endswith("  r-plain")]
    moment, level, logger, client, method = line.split()[:5]
    assert (level, logger, client, method) == ("INFO", "access", "127.0.0.1", "POST")
    assert line.index("127.0.0.1") == len(moment) + len(" WARNING engine.process ")


def test_documented_log_fields_are_those_that_are_logged(entries: list[dict[str, Any]]) -> None:
    table = (ROOT / "docs" / "logs.md").read_text().partition("| field |")[2].partition("\n\n")[0]
    documented = {name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    elsewhere = {"trace_id", "span_id", "exception", "prompt_texts", "completion_texts", "dropped_lines"}
    assert documented == {name for entry in entries for name in entry} | elsewhere


def test_a_server_that_cannot_start_logs_the_reason_in_the_chosen_format(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server", "serve", "--port", "0", "--log-format", "json"]
    ended = subprocess.run([*command, "--model", str(tmp_path / "none")], cwd=ROOT, capture_output=True, timeout=60)
    assert ended.returncode == 1
    started, entry = map(json.loads, ended.stderr.splitlines())
    assert started["message"].startswith("fastblt ")
    assert entry["level"] == "critical" and "none" in entry["message"]
