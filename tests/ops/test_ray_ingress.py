"""The ingress's application in this process: a stand-in for Ray's handle has one replica."""

import asyncio
import json
import logging
import warnings
from collections.abc import AsyncGenerator, AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from deploy.ray_call import Call, Reply, encode_reply
from deploy.ray_load import Load
from deploy.ray_settings import RaySettings
from server.settings import ServerSettings
from tests.scripted_server import until

with warnings.catch_warnings():
    # Ray's own, of which there are some.
    warnings.simplefilter("ignore")
    from deploy import ray_serve
    from deploy.ray_ingress import Ingress

KEY = "a-key-of-this-test"
ORIGIN = {"origin": "https://a.example"}
PATH = "/v1/completions"


class Replicas:
    """In place of Ray's handle: one replica that answers everything with its path, a stream until it is stopped."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._stopped = asyncio.Event()

    def broadcast(self, method: str) -> "Replicas":
        assert method == "stop"
        return self

    async def results_async(self, return_exceptions: bool) -> None:
        self._stopped.set()

    def options(self, **given: Any) -> "Replicas":
        return self

    async def remote(self, call: Call) -> AsyncGenerator[bytes, None]:
        self.calls.append(call)
        headers = [(b"content-type", b"text/plain")]
        start = {"type": "http.response.start", "status": 200, "headers": headers}
        body = {"type": "http.response.body", "body": call.scope["path"].encode(), "more_body": False}
        yield encode_reply(Reply("one", load=Load()))
        if b"stream" in call.body:
            start["headers"] = [(b"content-type", b"text/event-stream; charset=utf-8")]
            yield encode_reply(Reply(messages=[start]))
            await self._stopped.wait()
            return
        yield encode_reply(Reply(messages=[start, body]))


@pytest.fixture
def replicas() -> Replicas:
    return Replicas()


@pytest.fixture
def ingress(replicas: Replicas) -> Any:
    """Without Ray's wrapper around it, whose end must be awaited."""
    settings = ServerSettings(api_keys=KEY, cors_origins=ORIGIN["origin"], drain_seconds=300)  # type: ignore[arg-type]
    return Ingress.__mro__[1](replicas, settings, RaySettings())


@pytest.fixture
async def http(ingress: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = ingress.__serve_build_asgi_app__()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://ingress") as client:
        client.headers["x-request-id"] = "try-1"
        yield client


@pytest.mark.parametrize("given", [None, "Bearer wrong-key", f"Basic {KEY}"])
async def test_a_body_is_not_read_before_the_key_was_checked(
    http: httpx.AsyncClient, replicas: Replicas, given: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    num_read = 0

    async def parts() -> AsyncIterator[bytes]:
        nonlocal num_read
        num_read += 1
        yield b'{"prompt": "x"}'

    caplog.set_level(logging.INFO, "fastblt.access")
    headers = ORIGIN | ({"authorization": given} if given else {})
    answer = await http.post(PATH, content=parts(), headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert not num_read and not replicas.calls
    (record,) = (record for record in caplog.records if record.name == "fastblt.access")
    assert (record.status, record.error, record.path) == (401, "invalid_api_key", PATH)  # type: ignore[attr-defined]
    answer = await http.post(PATH, content=parts(), headers={"authorization": f"Bearer {KEY}"})
    assert (answer.text, num_read, len(replicas.calls)) == (PATH, 1, 1)


async def test_what_is_open_on_a_single_server_needs_no_key(http: httpx.AsyncClient) -> None:
    assert (await http.get("/page/main.js")).text == "/page/main.js"
    assert (await http.get("/version")).status_code == 401
    assert (await http.get("/health/live")).is_success


async def test_pages_of_allowed_origins_may_read_what_ingresses_and_replicas_answer(http: httpx.AsyncClient) -> None:
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    answers = [
        await http.options(PATH, headers=ORIGIN | asked),
        await http.post(PATH, headers=ORIGIN),
        await http.post(PATH, headers=ORIGIN | {"authorization": f"Bearer {KEY}"}, json={"prompt": "x"}),
    ]
    assert [answer.status_code for answer in answers] == [200, 401, 200]
    assert {answer.headers["access-control-allow-origin"] for answer in answers} == {ORIGIN["origin"]}


async def test_a_drain_is_cut_short(http: httpx.AsyncClient, ingress: Any, replicas: Replicas) -> None:
    asked = {"json": {"prompt": "x", "stream": True}, "headers": {"authorization": f"Bearer {KEY}"}}
    stream = asyncio.create_task(http.post(PATH, **asked))
    await until(lambda: bool(replicas.calls))
    draining = asyncio.create_task(ingress.drain())
    await until(lambda: ingress._gate.draining)
    assert not draining.done() and not stream.done()
    await ingress.cut_off()
    async with asyncio.timeout(5):
        await draining
        *_, error, done = (await stream).text.split("\n\n")[:-1]
    assert (json.loads(error.removeprefix("data: "))["error"]["code"], done) == ("draining", "data: [DONE]")


def test_the_cluster_is_left_when_ray_takes_too_long_to_remove_the_application(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[str] = []

    def too_long(name: str) -> None:
        raise TimeoutError(f"{name} was not deleted")

    monkeypatch.setattr(ray_serve.serve, "delete", too_long)
    monkeypatch.setattr(ray_serve.serve, "status", lambda: SimpleNamespace(applications={ray_serve.NAME: None}))
    monkeypatch.setattr(ray_serve.serve, "shutdown", lambda: left.append("serve"))
    monkeypatch.setattr(ray_serve.ray, "shutdown", lambda: left.append("ray"))
    ray_serve._leave()
    assert left == ["serve", "ray"]
