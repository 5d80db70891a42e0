"""What a real engine does too rarely or too fast to wait for: a scripted one does it on the spot."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from engine.client import EngineClient, EngineDead
from engine.config import ModelLimits
from engine.types import DecoderCounts, Delta, Event, Facts, Failed, Finished, Request, Snapshot, Usage
from server.app import create_app
from server.settings import ServerSettings


class ScriptedClient(EngineClient):
    """Says "ab" and ends, but for what the prompt asks for."""

    def __init__(self) -> None:
        self.limits = ModelLimits("scripted", 1000, 260, None)
        self.facts = Facts()
        self.snapshot = Snapshot()
        self.state = "ready"
        self.restarts = 0
        self._child = None
        self.release = asyncio.Event()
        self.open = 0

    async def submit(self, request: Request) -> AsyncGenerator[Event, None]:
        order = bytes(token - 4 for token in request.prompt_ids[1:]).decode()
        self.open += 1
        try:
            if order == "wait":
                await self.release.wait()
            if order == "patches":
                yield Failed(id=request.id, code="too_long", message="too many patches", param="prompt")
                return
            if order == "break":
                raise KeyError("a secret")
            if order == "dead":
                raise EngineDead("it failed 4 times in a row")
            yield Delta(id=request.id, ids=[101], text=b"a")
            if order == "pause":
                await self.release.wait()
            if order == "internal later":
                yield Failed(id=request.id, code="internal", message="the engine failed repeatedly")
                return
            if order == "dead later":
                raise EngineDead("it failed 4 times in a row")
            if order == "break later":
                raise KeyError("a secret")
            yield Finished(id=request.id, reason="length", text=b"b", usage=Usage(prompt_tokens=1, completion_tokens=2))
        finally:
            self.open -= 1


@asynccontextmanager
async def serving(client: ScriptedClient, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(ServerSettings(**settings), client)
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_config=None, access_log=False))
    task = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
            yield http
    finally:
        client.release.set()
        server.should_exit = True
        await task


def body(prompt: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "scripted", "prompt": prompt, **fields}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def settled(client: ScriptedClient, num_open: int) -> None:
    await until(lambda: client.open == num_open)


async def test_a_full_queue_refuses_and_takes_again() -> None:
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


async def test_who_has_a_first_byte_does_not_wait() -> None:
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
async def test_what_fails_before_the_first_byte_has_a_status_of_its_own(stream: bool) -> None:
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


async def test_what_fails_in_a_stream_is_its_last_event_and_ends_the_other_choices() -> None:
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


async def test_an_error_behind_status_200_is_a_warning_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(ScriptedClient()) as http:
        for order in ("dead later", "break later"):
            await http.post("/v1/completions", json=body(order, stream=True), headers={"x-request-id": order[:4]})
    records = [record for record in caplog.records if record.name == "fastblt.access"]
    told = [(r.levelname, r.status, r.error, r.completion_bytes) for r in records]  # type: ignore[attr-defined]
    assert told == [("WARNING", 200, "engine_dead", 1), ("WARNING", 200, "internal_error", 1)]
    assert "engine_dead" in records[0].getMessage()


async def test_a_silent_stream_is_kept_open_with_comments() -> None:
    client = ScriptedClient()
    async with (
        serving(client, keepalive_seconds=0.05) as http,
        http.stream("POST", "/v1/completions", json=body("wait", stream=True)) as response,
    ):
        lines = response.aiter_lines()
        assert response.status_code == 200
        assert (await anext(lines)).startswith(":")
        client.release.set()
        data = [line[6:] async for line in lines if line.startswith("data:")]
        assert "".join(json.loads(part)["choices"][0]["text"] for part in data[:-1]) == "ab"


async def test_health_tells_a_pause_from_an_end() -> None:
    client = ScriptedClient()
    async with serving(client) as http:

        async def health() -> tuple[int, int]:
            return (await http.get("/health/live")).status_code, (await http.get("/health/ready")).status_code

        assert await health() == (200, 200)
        client.state = "restarting"
        assert await health() == (200, 503)
        assert (await http.post("/v1/completions", json=body("a"))).status_code == 200
        client.state = "dead"
        assert await health() == (503, 503)
        refused = await http.post("/v1/completions", json=body("a"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_dead")
        assert "retry-after" in refused.headers


async def test_a_body_that_does_not_come_is_given_up() -> None:
    async with serving(ScriptedClient(), body_timeout=0.1) as http:
        reader, writer = await asyncio.open_connection(http.base_url.host, http.base_url.port)
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n"
        writer.write(head + b"{")
        async with asyncio.timeout(5):
            response = await reader.readuntil(b"}}")
        writer.close()
        await writer.wait_closed()
    assert response.startswith(b"HTTP/1.1 408 ")
    assert json.loads(response.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_timeout"


async def test_counters_go_on_when_the_engine_starts_anew() -> None:
    client = ScriptedClient()
    async with serving(client) as http:

        async def committed() -> list[str]:
            lines = (await http.get("/metrics")).text.splitlines()
            names = ("fastblt_committed_bytes_total", "fastblt_stage_rows_total")
            return sorted(line for line in lines if line.startswith(names))

        client.snapshot = Snapshot(decoders={"blt-s": DecoderCounts(committed=10)}, rows={"global": 5})
        assert await committed() == [
            'fastblt_committed_bytes_total{decoder="blt-s"} 10.0',
            'fastblt_stage_rows_total{stage="global"} 5.0',
        ]
        client.snapshot = Snapshot()
        await committed()
        client.snapshot = Snapshot(decoders={"blt-s": DecoderCounts(committed=3)}, rows={"global": 2})
        assert await committed() == [
            'fastblt_committed_bytes_total{decoder="blt-s"} 13.0',
            'fastblt_stage_rows_total{stage="global"} 7.0',
        ]


async def test_pages_of_named_origins_may_call() -> None:
    origin = {"origin": "https://a.example"}
    async with serving(ScriptedClient(), cors_origins=["https://a.example"], api_keys=["k"]) as http:
        asked = origin | {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        preflight = await http.options("/v1/completions", headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://a.example"
    async with serving(ScriptedClient()) as http:
        assert "access-control-allow-origin" not in (await http.get("/v1/models", headers=origin)).headers
