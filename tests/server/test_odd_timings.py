"""What a real engine does too rarely or too fast to wait for: a scripted one does it on the spot."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Sequence

import openai
import pytest

from engine.config import EOS_ID
from engine.process.client import UNREADY_BEATS
from engine.types import DecoderCounts, Delta, Event, Finished, Request, Snapshot, Usage
from tests.scripted_server import ScriptedClient, body, serving, settled


async def test_a_full_queue_refuses_requests_until_it_has_room() -> None:
    client = ScriptedClient()
    async with serving(client, max_queue=3, max_choices=3, retry_after=7) as http:
        waiting = [asyncio.create_task(http.post("/v1/completions", json=body("wait", n=n))) for n in (1, 2)]
        await settled(client, 3)
        refused = await http.post("/v1/completions", json=body("wait"))
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "7"
        assert refused.json()["error"]["code"] == "queue_full"
        async with openai.AsyncOpenAI(base_url=f"{http.base_url}/v1/", api_key="x", max_retries=0) as api:
            with pytest.raises(openai.RateLimitError):
                await api.completions.create(model="scripted", prompt="wait")
        client.release.set()
        assert [(await response).status_code for response in waiting] == [200, 200]
        assert (await http.post("/v1/completions", json=body("", n=3))).status_code == 200


async def test_a_request_with_a_first_byte_does_not_count_as_queued() -> None:
    client = ScriptedClient()
    async with serving(client, max_queue=1, max_choices=1) as http:
        running = asyncio.create_task(http.post("/v1/completions", json=body("pause")))
        await settled(client, 1)
        async with asyncio.timeout(5):
            while (await http.post("/v1/completions", json=body("x"))).status_code != 200:
                pass
        client.release.set()
        assert (await running).json()["choices"][0]["text"] == "ab"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_before_the_first_byte_has_an_error_status(stream: bool) -> None:
    client = ScriptedClient()
    async with serving(client) as http:
        for order, status, code in (
            ("patches", 400, "context_length_exceeded"),
            ("break", 500, "internal_error"),
            ("dead", 503, "engine_dead"),
        ):
            response = await http.post("/v1/completions", json=body(order, stream=stream))
            assert (response.status_code, response.json()["error"]["code"]) == (status, code)
            assert "secret" not in response.text
            assert response.headers["x-request-id"]
        await settled(client, 0)


async def test_a_failure_in_a_stream_is_its_last_event_and_ends_the_other_choices() -> None:
    client = ScriptedClient()
    async with serving(client) as http:
        for order, code in (
            ("internal later", "internal_error"),
            ("dead later", "engine_dead"),
            ("break later", "internal_error"),
        ):
            response = await http.post("/v1/completions", json=body(["pause", order], stream=True))
            events = [line[6:] for line in response.text.splitlines() if line]
            assert response.status_code == 200
            assert events[-1] == "[DONE]"
            assert json.loads(events[-2])["error"]["code"] == code
            assert "secret" not in response.text
            await settled(client, 0)
        async with openai.AsyncOpenAI(base_url=f"{http.base_url}/v1/", api_key="x", max_retries=0) as api:
            with pytest.raises(openai.APIError, match="repeatedly"):
                async for _ in await api.completions.create(model="scripted", prompt="internal later", stream=True):
                    pass


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("order", "reason"),
    [
        ("internal later", "error"),
        ("dead", "error"),
        ("dead later", "error"),
        ("break later", "error"),
        ("patches", "refused"),
    ],
)
async def test_what_ends_one_choice_counts_for_all_of_its_request(order: str, reason: str, stream: bool) -> None:
    client = ScriptedClient()
    async with serving(client) as http:
        await http.post("/v1/completions", json=body([order, "wait"], n=3, stream=stream, decoder="blt"))
        await settled(client, 0)
        lines = (await http.get("/metrics")).text.splitlines()
    ended = [line for line in lines if line.startswith("fastblt_sequences_total") and not line.endswith(" 0.0")]
    assert ended == [f'fastblt_sequences_total{{decoder="blt",finish_reason="{reason}"}} 6.0']


async def test_an_error_after_status_200_is_logged_as_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(ScriptedClient()) as http:
        for order in ("dead later", "break later"):
            await http.post("/v1/completions", json=body(order, stream=True), headers={"x-request-id": order[:4]})
    records = [record for record in caplog.records if record.name == "fastblt.access"]
    told = [(r.levelname, r.status, r.error, r.completion_bytes) for r in records]  # type: ignore[attr-defined]
    assert told == [("WARNING", 200, "engine_dead", 1), ("WARNING", 200, "internal_error", 1)]
    assert "engine_dead" in records[0].getMessage()


async def test_a_silent_stream_is_kept_open_with_keepalives_that_are_no_events() -> None:
    client = ScriptedClient()
    async with (
        serving(client, keepalive_seconds=0.05) as http,
        http.stream("POST", "/v1/completions", json=body("wait", stream=True)) as response,
    ):
        parts = response.aiter_bytes()
        assert response.status_code == 200
        first = await anext(parts)
        assert first and not first.strip(b"\n")
        client.release.set()
        text = (first + b"".join([part async for part in parts])).decode()
        # A reader of lines, one that cuts at empty lines, and vLLM's, which strips each part.
        for events in (text.splitlines(), text.split("\n\n"), text.strip().split("\n\n")):
            data = [event for event in events if event]
            assert all(event.startswith("data: ") for event in data) and data.pop() == "data: [DONE]"
            assert "".join(json.loads(event[6:])["choices"][0]["text"] for event in data) == "ab"


async def test_a_refusal_by_the_engine_names_the_prompt_of_several() -> None:
    async with serving(ScriptedClient()) as http:
        for prompt, name in (("patches", "prompt"), (["a", "b", "patches"], "prompt[2]")):
            answer = await http.post("/v1/completions", json=body(prompt, n=2))
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, "prompt")
            assert error["message"] == f"{name}: makes too many patches"


class Mute(ScriptedClient):
    """Generates ids that are no text."""

    async def submit(self, request: Request, told: Sequence[Delta] = ()) -> AsyncGenerator[Event, None]:
        while not self.release.is_set():
            yield Delta(id=request.id, ids=[EOS_ID])
            await asyncio.sleep(0.01)
        yield Finished(id=request.id, reason="length", usage=Usage())


async def test_a_stream_whose_events_have_no_text_is_kept_open_too() -> None:
    client = Mute()
    async with asyncio.timeout(10), serving(client, keepalive_seconds=0.3) as http:
        began = time.monotonic()
        async with http.stream("POST", "/v1/completions", json=body("x", stream=True)) as response:
            parts = response.aiter_bytes()
            for number in (1, 2):
                assert not (await anext(parts)).strip(b"\n") and time.monotonic() - began > 0.25 * number
            client.release.set()
            assert b"".join([part async for part in parts]).strip().endswith(b"data: [DONE]")


async def test_health_routes_distinguish_a_restarting_engine_from_a_dead_one() -> None:
    client = ScriptedClient()
    async with serving(client) as http:

        async def health() -> tuple[int, int]:
            return (await http.get("/health/live")).status_code, (await http.get("/health/ready")).status_code

        assert await health() == (200, 200)
        client.state = "restarting"
        assert await health() == (200, 503)
        assert (await http.post("/v1/completions", json=body("a"))).status_code == 200
        client.state, client._missed_beats = "ready", UNREADY_BEATS
        assert await health() == (200, 503)
        client.state, client._failing_since = "restarting", time.monotonic() - 20
        assert await health() == (200, 503)
        client._failing_since = time.monotonic() - 40
        assert await health() == (503, 503)
        down = await http.post("/v1/completions", json=body("a"))
        assert (down.status_code, down.json()["error"]["code"]) == (503, "engine_dead")
        assert "no engine has worked for 40 s" in down.json()["error"]["message"]
        client.state = "dead"
        assert await health() == (503, 503)
        refused = await http.post("/v1/completions", json=body("a"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_dead")
        assert "retry-after" in refused.headers


async def test_metrics_counters_continue_when_the_engine_restarts() -> None:
    client = ScriptedClient()
    async with serving(client) as http:

        async def committed() -> list[str]:
            lines = (await http.get("/metrics")).text.splitlines()
            names = ("fastblt_committed_bytes_total", "fastblt_stage_rows_total", "fastblt_log_lines_dropped_total")
            # What this process dropped depends on the tests that ran before.
            return sorted(line for line in lines if line.startswith(names) and 'process="server"' not in line)

        client.snapshot = Snapshot(
            decoders={"blt-s": DecoderCounts(committed=10)}, rows={"global": 5}, dropped_log_lines=2
        )
        assert await committed() == [
            'fastblt_committed_bytes_total{decoder="blt-s"} 10.0',
            'fastblt_log_lines_dropped_total{process="engine"} 2.0',
            'fastblt_stage_rows_total{stage="global"} 5.0',
        ]
        client.snapshot = Snapshot()
        await committed()
        client.snapshot = Snapshot(
            decoders={"blt-s": DecoderCounts(committed=3)}, rows={"global": 2}, dropped_log_lines=1
        )
        assert await committed() == [
            'fastblt_committed_bytes_total{decoder="blt-s"} 13.0',
            'fastblt_log_lines_dropped_total{process="engine"} 3.0',
            'fastblt_stage_rows_total{stage="global"} 7.0',
        ]


async def test_pages_of_allowed_cors_origins_may_call_the_api() -> None:
    origin = {"origin": "https://a.example"}
    async with serving(ScriptedClient(), keys=(b"k",), cors_origins=["https://a.example"]) as http:
        asked = origin | {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        preflight = await http.options("/v1/completions", headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://a.example"
        other = await http.get("/v1/models", headers={"origin": "https://b.example"} | {"authorization": "Bearer k"})
        assert other.status_code == 200 and "access-control-allow-origin" not in other.headers
        broken = body("break") | {"decoder": "blt"}
        with_key = {"authorization": "Bearer k"}
        for given, answer in (
            (origin, await http.get("/v1/models", headers=origin)),
            (origin | with_key, await http.post("/v1/completions", json=broken, headers=origin | with_key)),
        ):
            assert answer.status_code == (500 if given != origin else 401)
            assert answer.headers["access-control-allow-origin"] == "https://a.example"
            exposed = answer.headers["access-control-expose-headers"].lower()
            assert "x-request-id" in exposed and "retry-after" in exposed
    async with serving(ScriptedClient()) as http:
        assert "access-control-allow-origin" not in (await http.get("/v1/models", headers=origin)).headers
