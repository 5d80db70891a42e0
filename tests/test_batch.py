"""`fastblt batch` against real servers over sockets."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import time
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from clients.batch import requests
from clients.batch.index import Index
from clients.batch.requests import Answered, Refused, Request, pending
from clients.batch.results import START, BatchError, Results
from clients.batch.run import Counts, Settings, run
from server.cli import app
from tests.conftest import COMMAND, ROOT
from tests.scripted_server import ScriptedClient, serving, settled
from tests.test_clients import answer, scripted

runner = CliRunner()


def line(custom_id: Any, **changes: Any) -> bytes:
    body = {"prompt": f"say {custom_id}", "max_tokens": 2, "temperature": 0}
    fields = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body, **changes}
    return json.dumps({name: value for name, value in fields.items() if value is not ...}).encode() + b"\n"


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def batch(source: Path, target: Path, url: str, *flags: str) -> Result:
    return runner.invoke(app, ["batch", str(source), str(target), "--url", url, *flags])


WRONG = [
    (b'{"custom_id": \n', "invalid_json", None, "not JSON: "),
    (b"\xff\n", "invalid_json", None, "not JSON: "),
    (b"[" * 100_000 + b"\n", "invalid_json", None, "not JSON: "),
    (b"[]\n", "invalid_json", None, "must be an object with custom_id, method, url, body"),
    (line(...), "invalid_value", None, "custom_id must be a non-empty string"),
    (line(7), "invalid_value", None, "custom_id must be a non-empty string"),
    (line("\ud800"), "invalid_value", None, "half of a surrogate pair"),
    (line("a", method="GET"), "invalid_method", "a", "method must be 'POST', not 'GET'"),
    (line("a", url="/v1/chat/completions"), "invalid_url", "a", "not '/v1/chat/completions'"),
    (line("a", url=...), "invalid_url", "a", "url must be '/v1/completions', not None"),
    (line("a", body=[1] * 100), "invalid_value", "a", "body must be an object, not [1, 1"),
    (line("a", body={"stream": True}), "invalid_value", "a", "body.stream must be false or missing"),
    (line("a", body={"temperature": float("nan")}), "invalid_value", "a", "body has NaN or an infinite number"),
    (line("a", extra=1), "invalid_value", "a", "'extra' is not a field of a request"),
]


@pytest.mark.parametrize(("text", "code", "custom_id", "message"), WRONG)
def test_a_wrong_line_is_named_with_its_number(text: bytes, code: str, custom_id: str | None, message: str) -> None:
    first, third, fourth = pending(BytesIO(line("x") + b"  \n" + text + line("z").rstrip()), Index())
    assert first == Request(1, "x", json.dumps(json.loads(line("x"))["body"]).encode())
    assert isinstance(fourth, Request) and (fourth.line, fourth.custom_id) == (4, "z")
    assert isinstance(third, Refused) and third.line == 3
    assert (third.error.code, third.error.custom_id) == (code, custom_id)
    assert str(third.error).startswith("line 3: ") and message in str(third.error)


def test_a_custom_id_belongs_to_its_first_line() -> None:
    text, index = line("a") + line("b", method="PUT") + line("a") + line("b"), Index()
    first, *others = pending(BytesIO(text), index)
    assert isinstance(first, Request) and all(isinstance(other, Refused) for other in others)
    assert str(others[1].error) == "line 3: custom_id 'a' is already on line 1"
    assert str(others[2].error) == "line 4: custom_id 'b' is already on line 2"
    index.add_answered("a")
    assert isinstance(next(pending(BytesIO(text), index)), Answered)


def test_a_line_that_is_too_long_is_skipped_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "LONGEST_LINE", 200)
    huge = line("a" * 1000)
    first, second, third = pending(BytesIO(huge + line("b") + huge), Index())
    assert isinstance(second, Request) and second.line == 2
    for item, number in ((first, 1), (third, 3)):
        assert isinstance(item, Refused) and str(item.error) == f"line {number}: longer than 200 bytes"
    assert requests.count_lines(BytesIO(huge + b"\n" + line("b") + huge)) == 3


def test_every_line_gets_the_answer_of_the_server(tiny_server: str, tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_bytes(line("a") + line("b", body={"n": 0}) + b"{\n" + line("a"))
    result = batch(source, target, tiny_server)
    assert result.exit_code == 1
    assert result.stderr == "batch: 4 of 4 lines, 3 failed\n"
    found = {(entry["custom_id"], (entry["error"] or {}).get("line")): entry for entry in answers(target)}
    assert found.keys() == {("a", None), ("b", None), (None, 3), ("a", 4)} and len(answers(target)) == 4
    direct = httpx.post(f"{tiny_server}/v1/completions", json=json.loads(line("a"))["body"]).json()
    response = found["a", None]["response"]
    assert response["status_code"] == 200 and response["body"]["choices"] == direct["choices"]
    assert response["request_id"].startswith("req-")
    assert found["b", None]["response"]["status_code"] == 400
    assert found["b", None]["response"]["body"]["error"]["param"] == "n"
    assert found["a", 4]["error"]["code"] == "duplicate_custom_id" and found["a", 4]["response"] is None
    before = target.read_bytes()
    again = batch(source, target, tiny_server)
    assert again.exit_code == 1 and target.read_bytes() == before
    assert again.stderr == "batch: 4 of 4 lines, 4 answered by an earlier run, 3 failed\n"


BATCH = b"".join([line("a"), b"\n", line("\xe4"), b"nonsense\n", line("c", url="/"), line("a"), line("d").rstrip()])


def outcome(path: Path) -> list[Any]:
    """What a run came to, in an order of its own."""
    return sorted(
        (entry["custom_id"] or "", str(entry["error"]), str((entry["response"] or {}).get("body", {}).get("choices")))
        for entry in answers(path)
    )


@pytest.fixture(scope="module")
def whole(tiny_server: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a batch and its output."""
    folder = tmp_path_factory.mktemp("batch")
    (folder / "in").write_bytes(BATCH)
    run(folder / "in", folder / "out", Settings(tiny_server), Counts())
    assert len(answers(folder / "out")) == 6
    return folder


@given(share=st.floats(0, 1))
@settings(max_examples=20)
def test_a_run_after_a_kill_at_any_byte_adds_up_to_one_run(share: float, whole: Path, tiny_server: str) -> None:
    written = (whole / "out").read_bytes()
    kept = written[: round(share * len(written))]
    target = whole / "resumed"
    target.write_bytes(kept)
    counts = Counts()
    run(whole / "in", target, Settings(tiny_server), counts)
    assert outcome(target) == outcome(whole / "out")
    complete = kept.count(b"\n")
    assert target.read_bytes().startswith(written[: kept.rfind(b"\n") + 1])
    # A whole last line without its end counts, too.
    assert counts.earlier in (complete, complete + 1) and counts.done == counts.total == 6


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_keeps_what_was_written(sign: signal.Signals, tiny_server: str, tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    body = {"prompt": "x", "max_tokens": 20, "ignore_eos": True, "temperature": 0}
    source.write_bytes(b"".join(line(str(i), body=body) for i in range(60)))
    command = [*COMMAND, "batch", source, target, "--url", tiny_server, "--concurrency", "2"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, preexec_fn=heed_interrupts) as process:
        while not target.exists() or target.read_bytes().count(b"\n") < 3:
            time.sleep(0.005)
        process.send_signal(sign)
        _, notes = process.communicate(timeout=20)
    assert process.returncode == (130 if sign == signal.SIGINT else -sign)
    assert sign == signal.SIGKILL or b"run the same command again to continue" in notes
    before = target.read_bytes()
    assert 3 <= before.count(b"\n") < 60
    assert batch(source, target, tiny_server).exit_code == 0
    assert target.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert sorted(int(entry["custom_id"]) for entry in answers(target)) == list(range(60))


def heed_interrupts() -> None:
    # When the tests run in the background of a shell, their child processes ignore interrupts.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


BUSY = answer(429, b'{"error": {"message": "busy"}}', "retry-after: 0")
DONE = answer(200, b'{"choices": []}', "x-request-id: r")


def one_line(folder: Path) -> tuple[Path, Path]:
    (folder / "in").write_bytes(line("a"))
    return folder / "in", folder / "out"


@pytest.mark.parametrize("refusal", [BUSY, BUSY.replace(b"429", b"503"), b""], ids=["429", "503", "lost"])
def test_a_request_is_tried_again_within_its_bound(
    refusal: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clients.batch.run.retry_delay", lambda attempt, after: 0.0 if after in ("", "0") else 99.0)
    source, target = one_line(tmp_path)
    with scripted(refusal, refusal, DONE) as (url, seen):
        assert batch(source, target, url, "--retries", "2", "--api-key", "secret").exit_code == 0
    assert len(seen) == 3 and all(b"authorization: bearer secret" in request.lower() for request in seen)
    assert [entry["response"]["request_id"] for entry in answers(target)] == ["r"]
    target.unlink()
    with scripted(refusal, refusal) as (url, seen):
        assert batch(source, target, url, "--retries", "1").exit_code == 1
    (entry,) = answers(target)
    if refusal:
        assert entry["response"]["status_code"] == int(refusal.split()[1])
    else:
        assert entry["error"]["code"] == "connection_lost" and "lost 2 times" in entry["error"]["message"]


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_ends_the_batch_and_leaves_its_lines(status: int, tmp_path: Path) -> None:
    source, target = one_line(tmp_path)
    with scripted(answer(status, b'{"error": {"message": "no such key"}}')) as (url, _):
        result = batch(source, target, url)
    assert result.exit_code == 1 and target.read_bytes() == b""
    assert result.stderr == "fastblt: the server refuses the API key: no such key\n"


def test_without_a_server_the_batch_ends_and_leaves_its_lines(tmp_path: Path) -> None:
    source, target = one_line(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    result = batch(source, target, url, "--retries", "0")
    assert result.exit_code == 1 and target.read_bytes() == b""
    assert result.stderr.startswith(f"fastblt: no connection to {url}: ")
    assert result.stderr.splitlines()[0].endswith("; is the server running there? --url names another")
    assert "url: must be like http://" in batch(source, target, "127.0.0.1:8000").stderr


def test_an_answer_that_never_comes_is_an_error_of_its_line(tmp_path: Path) -> None:
    source, target = one_line(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert batch(source, target, url, "--timeout", "0.1").exit_code == 1
    assert answers(target)[0]["error"]["code"] == "timeout"


def test_an_answer_that_is_no_json_is_kept_as_an_error(tmp_path: Path) -> None:
    source, target = one_line(tmp_path)
    with scripted(answer(504, b"<html>bad gateway")) as (url, _):
        assert batch(source, target, url).exit_code == 1
    response = answers(target)[0]["response"]
    assert response["status_code"] == 504 and "<html>bad gateway" in response["body"]["error"]["message"]


@pytest.mark.parametrize("body", [b"<html>sign in", b'"sign in"', b"[" * 100_000], ids=["page", "text", "deep"])
def test_a_success_that_is_no_json_object_is_an_error_of_its_line(body: bytes, tmp_path: Path) -> None:
    source, target = one_line(tmp_path)
    with scripted(answer(200, body)) as (url, _):
        result = batch(source, target, url)
    assert result.exit_code == 1 and result.stderr == "batch: 1 of 1 lines, 1 failed\n"
    (entry,) = answers(target)
    assert entry["response"] is None and entry["error"]["code"] == "invalid_answer"
    assert entry["error"]["message"] == f"status 200, but no JSON object: {body[:200].decode()}"


def test_standard_input_and_output_take_the_place_of_files(tiny_server: str) -> None:
    command = [*COMMAND, "batch", "-", "-", "--url", tiny_server]
    done = subprocess.run(command, cwd=ROOT, input=line("a") + line("b"), capture_output=True, check=True)
    found = [json.loads(text) for text in done.stdout.splitlines()]
    assert {entry["custom_id"] for entry in found} == {"a", "b"}
    assert done.stderr == b"batch: 2 lines\n"


def test_a_batch_may_end_before_its_input(tmp_path: Path) -> None:
    """Its reader waits for a terminal or a pipe, which nothing can interrupt."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [*COMMAND, "batch", "-", str(tmp_path / "out"), "--url", f"http://127.0.0.1:{port}", "--retries", "0"]
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        assert process.stdin and process.stderr
        process.stdin.write(line("a"))
        process.stdin.flush()
        assert process.wait(60) == 1
        assert b"no connection to" in process.stderr.read()


def test_a_text_that_is_no_unicode_spoils_only_its_line(tiny_server: str, tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_bytes(line("a", body={"prompt": "\ud800"}) + line("b"))
    assert batch(source, target, tiny_server).exit_code == 1
    assert {entry["custom_id"]: entry["response"]["status_code"] for entry in answers(target)} == {"a": 400, "b": 200}


@pytest.mark.parametrize("text", [b"a shopping list", b"{}\n", b'{"id": 1, "error": null}\n', b"x\n" + START, b"1\n"])
def test_a_file_that_is_no_output_is_refused_and_left_alone(text: bytes, tmp_path: Path) -> None:
    source, target = one_line(tmp_path)
    target.write_bytes(text)
    with pytest.raises(BatchError, match="not an answer of a batch"):
        run(source, target, Settings("http://127.0.0.1:1"), Counts())
    assert target.read_bytes().startswith(text.removesuffix(START))
    with pytest.raises(BatchError, match="must not be the input"):
        run(source, source, Settings("http://127.0.0.1:1"), Counts())


def test_two_runs_cannot_write_one_output(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with closing(Results.open(target)), pytest.raises(BatchError, match="another batch is writing"):
        Results.open(target)


async def test_a_batch_reads_no_further_than_it_sends(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    os.mkfifo(source)
    written = 0

    def write() -> None:
        nonlocal written
        with source.open("wb", buffering=0) as file:
            for number in range(100):
                file.write(line(str(number), body={"prompt": "wait"}).replace(b"\n", b" " * 65536 + b"\n"))
                written = number

    client, counts = ScriptedClient(), Counts()
    async with serving(client) as http:
        chosen = Settings(str(http.base_url), concurrency=2)
        writer = asyncio.create_task(asyncio.to_thread(write))
        sender = asyncio.create_task(asyncio.to_thread(run, source, target, chosen, counts))
        await settled(client, 2)
        await asyncio.sleep(0.2)
        assert 2 <= written < 12 and client.open == 2
        client.release.set()
        await asyncio.gather(writer, sender)
    assert (counts.total, counts.done, counts.failed) == (None, 100, 0) and len(answers(target)) == 100
