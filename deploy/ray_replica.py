"""A replica: the application of `fastblt serve` with its own engine process, reached through Ray."""

import asyncio
import os
import socket
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

from ray import serve
from starlette.types import Message

from engine import logs
from engine.config import EngineConfig
from engine.hub import localised
from engine.process.client import EngineClient
from server.app import create_app
from server.lifecycle import make_traces
from server.settings import ServerSettings

from .ray_router import Call

GATHER_SECONDS = 0.01
"""Output sooner than this after the last is sent with what follows: a message costs three processes the same, whatever
its size."""


class Replica:
    """Ray creates it, checks its health, and lets it finish its requests before stopping it.

    If it is killed, its engine ends too, when the parent's end of a pipe closes.
    """

    async def __init__(self, settings: ServerSettings, config: EngineConfig) -> None:  # type: ignore[misc]
        """Ray awaits it."""
        logs.configure(settings.logs, "server")
        # As in `server.cli`; the engine's process inherits it.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        self._id = serve.get_replica_context().replica_id.unique_id
        self._traces = make_traces(settings)
        config = await asyncio.to_thread(localised, config)
        self._client = EngineClient(config, logs=settings.logs, loading_seconds=settings.loading_seconds)
        self._restart_seconds = settings.restart_seconds
        await self._client.start()
        self._app = create_app(settings, self._client, settings.load_api_keys(), self._traces)

    async def answer(self, call: Call) -> AsyncGenerator[list[Message], None]:
        """The application's messages, as they come. First comes an empty list: the call has a replica.
        Closed early, the application sees its client leave."""
        yield []
        if call.replica not in (None, self._id):
            # The engine died between the two calls.
            return
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        bodies = [{"type": "http.request", "body": call.body, "more_body": False}]
        left = asyncio.Event()

        async def receive() -> Message:
            if bodies:
                return bodies.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app(call.scope, receive, messages.put)
            finally:
                messages.put_nowait(None)

        running = asyncio.create_task(run())
        yielded = 0.0
        try:
            while (message := await messages.get()) is not None:
                batch = [message]
                await asyncio.sleep(yielded + GATHER_SECONDS - time.monotonic())
                with suppress(asyncio.QueueEmpty):
                    while message := messages.get_nowait():
                        batch.append(message)
                yielded = time.monotonic()
                yield batch
                if message is None:
                    break
            await running
        finally:
            left.set()
            await asyncio.wait({running})

    async def state(self) -> dict[str, Any]:
        """Its name and address, and its engine's state."""
        return {
            "replica": self._id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "engine_pid": self._client.pid or 0,
            "engine": self._client.state,
        }

    async def check_health(self) -> None:
        """As `/health/live`: an engine that restarts is healthy; one that does not come back needs a new replica."""
        if down := self._client.down(self._restart_seconds):
            raise RuntimeError(down)

    async def stop(self) -> None:
        """Requests still running get an error."""
        await self._client.stop()

    async def __del__(self) -> None:
        """Ray awaits this, too."""
        await self.stop()
        if self._traces:
            await self._traces.close()
        self._app.state.grammars.close()
