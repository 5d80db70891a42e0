"""Times in `usage.fastblt`: they add up, and the client's clock bounds them."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from engine.types import Usage
from server import completions
from server.usage import fastblt_usage
from tests.scripted_server import ScriptedClient, body, serving, settled
from tests.serving import RunningServer

PARTS = ("queue_seconds", "prefill_seconds", "decode_seconds")


def timed(server: RunningServer, **fields: Any) -> tuple[dict[str, Any], float]:
    """`usage.fastblt` and how long the client waited. The prompt is long enough to take time."""
    asked = {"prompt": "all times " * 150, "max_tokens": 24, "ignore_eos": True, **fields}
    with server.client() as http:
        http.get("/health/live")
        began = time.perf_counter()
        answer = http.post("/v1/completions", json=asked)
        waited = time.perf_counter() - began
    assert answer.status_code == 200, answer.text
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    found: dict[str, Any] = json.loads(lines[-1] if lines else answer.text)["usage"]["fastblt"]
    return found, waited


@pytest.mark.parametrize("decoder", ["blt", "blt-s", "blt-d", "blt-dv"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_times_of_a_sequence_add_up(server: RunningServer, decoder: str, stream: bool) -> None:
    fields = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    found, waited = timed(server, decoder=decoder, cache_salt=f"{decoder} {stream}", **fields)
    queue, prefill, decode = (found[name] for name in PARTS)
    assert queue >= 0 and prefill > 0 and decode > 0
    assert queue + prefill <= found["first_byte_seconds"] < waited
    assert queue + prefill + decode < waited


def test_of_several_sequences_the_longest_times_count() -> None:
    usages = [
        Usage(queue_seconds=1.0, prefill_seconds=0.25, decode_seconds=3.0000004),
        Usage(queue_seconds=0.5, prefill_seconds=2.0, decode_seconds=1.0),
    ]
    cost = fastblt_usage("blt", usages, 1.5)
    assert [getattr(cost, name) for name in PARTS] == [1.0, 2.0, 3.0] and cost.first_byte_seconds == 1.5


def test_several_sequences_have_the_first_byte_of_the_first_one(server: RunningServer) -> None:
    """The long prompt is read in the same steps or later ones."""
    found, waited = timed(server, prompt=["a", "b" * 1500], n=2)
    assert all(0 <= found[name] < waited for name in PARTS)
    assert 0 < found["first_byte_seconds"] < waited


def test_a_request_without_output_has_no_first_byte(server: RunningServer) -> None:
    found, waited = timed(server, max_tokens=0)
    assert found["first_byte_seconds"] is None and found["decode_seconds"] == 0
    assert 0 < found["prefill_seconds"] < waited


def test_the_log_has_the_same_times(server: RunningServer) -> None:
    with server.client() as http:
        answer = http.post("/v1/completions", json={"prompt": "log", "max_tokens": 3, "ignore_eos": True})
    first = answer.json()["usage"]["fastblt"]["first_byte_seconds"]
    shown = f"first after {first * 1000:.3g} ms" if first < 1 else f"first after {first:.2f} s"
    deadline = time.monotonic() + 10
    while shown not in server.log.read_text():
        assert time.monotonic() < deadline, shown
        time.sleep(0.01)


async def test_the_first_byte_counts_from_the_arrival_of_the_request() -> None:
    client = ScriptedClient()
    async with serving(client) as http:
        began = time.perf_counter()
        asked = asyncio.create_task(http.post("/v1/completions", json=body("wait")))
        await settled(client, 1)
        held = time.perf_counter()
        await asyncio.sleep(0.1)
        before = time.perf_counter() - held
        client.release.set()
        answer = await asked
        waited = time.perf_counter() - began
    assert before < answer.json()["usage"]["fastblt"]["first_byte_seconds"] < waited


async def test_the_metrics_begin_when_the_whole_request_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client's slow upload is none of the server's time; what the server does before the admission is."""
    upload, parsing = 0.6, 0.2
    make_plan = completions.make_plan

    def slow_plan(*arguments: Any) -> Any:
        time.sleep(parsing)
        return make_plan(*arguments)

    async def slowly() -> AsyncIterator[bytes]:
        data = json.dumps(body("x")).encode()
        yield data[:10]
        await asyncio.sleep(upload)
        yield data[10:]

    monkeypatch.setattr(completions, "make_plan", slow_plan)
    async with serving(ScriptedClient()) as http:
        answer = await http.post("/v1/completions", content=slowly(), headers={"content-type": "application/json"})
        metrics = dict(line.rsplit(" ", 1) for line in (await http.get("/metrics")).text.splitlines())
    assert answer.json()["usage"]["fastblt"]["first_byte_seconds"] > upload + parsing
    for name in ("time_to_first_byte", "end_to_end"):
        seconds = float(metrics[f'fastblt_{name}_seconds_sum{{decoder="blt"}}'])
        assert parsing < seconds < upload, name
