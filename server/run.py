"""One server from start to end: model, port, requests, drain."""

import asyncio
import errno
import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import uvicorn
import uvloop

from engine import logs
from engine.client import EngineClient, EngineStartError
from engine.config import EngineConfig

from .admission import Gate
from .app import create_app, server_version
from .settings import ServerSettings

if TYPE_CHECKING:
    from .traces import Traces

log = logging.getLogger("fastblt.server")

OTLP_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
BACKLOG = 2048
KEEPALIVE_SECONDS = 75
LAST_RESPONSES_SECONDS = 5
"""For what is left of the responses when the drain is over."""


class ServeError(RuntimeError):
    """The server cannot start. The message is one line for the operator."""


def run(settings: ServerSettings, engine_config: EngineConfig) -> None:
    """Serves until a signal ends it. Raises ServeError."""
    logs.configure(settings.logs, "server")
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(settings, engine_config))
        log.info("stopped")
    except ServeError as error:
        if settings.log_format == "human":
            raise
        # Whoever reads the log of a container that does not start reads JSON, too.
        log.critical("%s", error)
        raise SystemExit(1) from None


async def serve(settings: ServerSettings, engine_config: EngineConfig) -> None:
    """Loads the model, then opens the port. SIGTERM or SIGINT drains; a second one does not wait. Raises ServeError."""
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    traces = make_traces(settings)
    # Taken before the model is loaded, so that a wrong port shows at once; nobody can connect yet.
    with closing(_bind(settings.host, settings.port)) as port:
        client = EngineClient(engine_config, logs=settings.logs)
        try:
            starting = asyncio.create_task(client.start())
            stop = asyncio.create_task(signals.get())
            await asyncio.wait({starting, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                starting.cancel()
                await asyncio.wait({starting})
                return
            stop.cancel()
            starting.result()
            await _serve_until_signal(settings, client, traces, port, signals)
        except EngineStartError as error:
            raise ServeError(str(error)) from error
        finally:
            await client.stop()
            if traces:
                await traces.close()


async def _serve_until_signal(
    settings: ServerSettings,
    client: EngineClient,
    traces: "Traces | None",
    port: socket.socket,
    signals: "asyncio.Queue[signal.Signals]",
) -> None:
    try:
        app = create_app(settings, client, traces)
    except (OSError, ValueError) as error:
        raise ServeError(f"API keys: {error}") from error
    gate: Gate = app.state.gate
    server = _Server(
        uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            log_level=max(logging.WARNING, log.getEffectiveLevel()),
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEPALIVE_SECONDS,
            timeout_graceful_shutdown=LAST_RESPONSES_SECONDS,
            backlog=BACKLOG,
        ),
        client.limits.name,
    )
    serving = asyncio.create_task(server.serve(sockets=[port]))
    first = asyncio.create_task(signals.get())
    await asyncio.wait({serving, first}, return_when=asyncio.FIRST_COMPLETED)
    if not serving.done():
        gate.drain()
        log.info("%s: draining for up to %g s", first.result().name, settings.drain_seconds)
        idle, second = asyncio.create_task(gate.wait_idle()), asyncio.create_task(signals.get())
        await asyncio.wait({serving, idle, second}, timeout=settings.drain_seconds, return_when=asyncio.FIRST_COMPLETED)
        if not idle.done():
            log.warning("requests are cut off")
            # Each of them gets an error, as its last event if it streams.
            await client.stop()
        server.should_exit, server.force_exit = True, second.done()
        idle.cancel()
        second.cancel()
    first.cancel()
    try:
        await serving
    except OSError as error:
        raise ServeError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}") from error


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, model: str) -> None:
        super().__init__(config)
        self._model = model

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # Said only now: whoever reads it may connect.
        host, number = self.servers[0].sockets[0].getsockname()[:2]
        log.info("serving %s on http://%s:%d", self._model, f"[{host}]" if ":" in host else host, number)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are handled above: the first one must not close the port, which still says that it drains."""
        yield


def make_traces(settings: ServerSettings) -> "Traces | None":
    """None unless they are asked for. Raises ServeError."""
    named = [name for name in OTLP_ENDPOINTS if os.environ.get(name)]
    asked = [f"--otlp-endpoint {settings.otlp_endpoint}"] if settings.otlp_endpoint else named
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if not asked or disabled or os.environ.get("OTEL_TRACES_EXPORTER") == "none":
        return None
    try:
        from .traces import Traces

        return Traces(settings.otlp_endpoint, server_version())
    except ImportError as error:
        raise ServeError(f'{asked[0]} asks for traces, which need: pip install "fastblt[traces]" ({error})') from error
    except ValueError as error:
        raise ServeError(f"traces: {error}") from error


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. Raises ServeError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        why = "the port is already in use" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
        raise ServeError(f"cannot listen on {host}:{port}: {why}") from error
    return bound
