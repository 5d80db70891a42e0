"""A replica: the application of `fastblt serve` with its own engine process, reached through Ray."""

import asyncio
import os
import socket
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from ray import serve

from engine import logs
from engine.config import EngineConfig
from engine.hub import localised
from engine.process.client import EngineClient
from server.app import create_app
from server.lifecycle import make_traces
from server.settings import ServerSettings

from .ray_answer import answer
from .ray_call import Call, Reply, encode_reply
from .ray_load import Meter
from .ray_scaling import QUEUED_BYTES, queued_bytes


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
        self._meter = Meter(self._app.state.service, config.max_sequences)

    async def answer(self, call: Call) -> AsyncGenerator[bytes, None]:
        """Replies, encoded."""
        yield encode_reply(Reply(replica=self._id, load=self._meter.report()))
        # It may have taken the place of the one that was meant.
        if call.replica in (None, self._id):
            async with aclosing(answer(self._app, call, self._id)) as batches:
                async for batch in batches:
                    yield encode_reply(Reply(messages=batch, load=self._meter.report()))

    async def state(self) -> dict[str, Any]:
        """Its name and address, and its engine's state."""
        return {
            "replica": self._id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "engine_pid": self._client.pid or 0,
            "engine": self._client.state,
        }

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For `ByQueuedBytes`."""
        return {QUEUED_BYTES: queued_bytes(list(self._app.state.service.generations.values()))}

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
