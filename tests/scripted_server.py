"""A server over a scripted engine, in this process: what a real engine does too rarely or too fast to wait for happens
on the spot."""

import asyncio
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fastapi import FastAPI

from engine.config import ModelLimits
from engine.logs import LogSettings
from engine.process.client import EngineClient, EngineDead
from engine.types import Delta, EngineInfo, Event, Failed, Finished, Request, Snapshot, TokenLogprob, Usage
from server.app import create_app
from server.http import bind
from server.lifecycle import HttpServer
from server.settings import ServerSettings


class ScriptedClient(EngineClient):
    """Says "ab" and ends, but for what the prompt asks for."""

    def __init__(self) -> None:
        self.limits = ModelLimits("scripted", 1000, 260, None, decoders=("auto", "blt"))
        self.info = EngineInfo()
        self.snapshot = Snapshot()
        self.state = "ready"
        self.restarts = 0
        self._process = None
        self._read = {}
        self._missed_beats = 0
        self._failing_since = None
        self._logs = LogSettings()
        self.release = asyncio.Event()
        self.open = 0
        self.requests: list[Request] = []

    async def submit(self, request: Request, earlier: Sequence[Delta] = ()) -> AsyncGenerator[Event, None]:
        order = bytes(token - 4 for token in request.prompt_ids if token > 3).decode()
        self.requests.append(request)
        self.open += 1
        try:
            if order == "wait":
                await self.release.wait()
            if order == "late":
                await asyncio.sleep(0.1)
                yield Finished(id=request.id, reason="timeout", usage=Usage(prompt_tokens=1))
                return
            if request.prompt_logprobs:
                yield Delta(id=request.id, prompt_logprobs=[TokenLogprob(i, -1.0, {}) for i in request.prompt_ids])
            if order == "patches":
                yield Failed(id=request.id, code="too_long", message="prompt: makes too many patches", param="prompt")
                return
            if order == "break":
                raise KeyError("a secret")
            if order == "dead":
                raise EngineDead("it failed 4 times in a row")
            while order == "drip":
                yield Delta(id=request.id, ids=[101], text=b"a")
                await asyncio.sleep(0.01)
            if order == "flood":
                for _ in range(request.max_tokens):
                    yield Delta(id=request.id, ids=[101] * 2048, text=b"a" * 2048)
                    await asyncio.sleep(0)
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
async def listening(app: FastAPI, settings: ServerSettings, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """Serves an application as `fastblt serve` does, on the port that this gives."""
    bound = bind("127.0.0.1", 0)
    port = bound.getsockname()[1]
    server = HttpServer(app, settings, bound, tls, "scripted")
    task = asyncio.create_task(server.serve())
    await until(lambda: server.started or task.done())
    try:
        yield port
    finally:
        server.should_exit = True
        await task


@asynccontextmanager
async def serving(
    client: ScriptedClient, keys: tuple[bytes, ...] = (), **settings: Any
) -> AsyncIterator[httpx.AsyncClient]:
    chosen = ServerSettings(**settings)
    async with listening(create_app(chosen, client, keys), chosen) as port:
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
                yield http
        finally:
            client.release.set()


def body(prompt: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "scripted", "prompt": prompt, **fields}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def settled(client: ScriptedClient, num_open: int) -> None:
    await until(lambda: client.open == num_open)
