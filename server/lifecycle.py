"""One server from start to end: model, port, requests, drain."""

import asyncio
import logging
import os
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
import uvloop
from fastapi import FastAPI

from engine import logs
from engine.config import EngineConfig
from engine.hub import HubError, localised
from engine.installed import installed
from engine.process.client import EngineClient, EngineStartError

from .addresses import parse_address
from .admission import Gate
from .app import create_app
from .http import Connections, HttpLimits, Listener, bind
from .http.connection import HttpConnection
from .settings import ServerSettings
from .tls import make_context

if TYPE_CHECKING:
    from .telemetry import Traces

log = logging.getLogger("fastblt.server")

OTLP_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that end the server. SIGHUP comes when its terminal is closed."""
LAST_RESPONSES_SECONDS = 5
"""Seconds for the rest of the responses when the drain is over."""


class ServeError(RuntimeError):
    """The server cannot start. The message is one line for the operator."""


def run(settings: ServerSettings, engine_config: EngineConfig, explain: Callable[[str], str] = str) -> None:
    """Serves until a signal ends it. Raises ServeError.

    explain: adds to an error's message where the settings that it names come from.
    """
    logs.configure(settings.logs, "server")
    try:
        # Report wrong settings at once, before a model is downloaded or loaded. The port is bound for the same reason;
        # no client can connect yet.
        keys, admin_keys, tls = load_keys(settings), load_admin_keys(settings), _make_tls(settings)
        traces = make_traces(settings)
        with closing(_bind(settings)) as port:
            log_installed(engine_config)
            engine_config = _localised(engine_config)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(serve(settings, engine_config, keys, admin_keys, tls, traces, port))
        log.info("stopped")
    except ServeError as error:
        if settings.log_format == "human":
            # The error must be the last line.
            logs.flush()
            raise ServeError(explain(str(error))) from error
        # A collector of JSON logs also needs the reason why a container does not start.
        log.critical("%s", explain(str(error)))
        raise SystemExit(1) from None


async def serve(
    settings: ServerSettings,
    engine_config: EngineConfig,
    keys: tuple[bytes, ...],
    admin_keys: tuple[bytes, ...],
    tls: ssl.SSLContext | None,
    traces: "Traces | None",
    port: socket.socket,
) -> None:
    """Loads the model, then opens the port. A signal drains; a second one does not wait. Raises ServeError."""
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        # A server that should outlive its terminal (nohup) is started with SIGHUP ignored, which stays so. A shell
        # ignores SIGINT for a background process but may still send it, so SIGINT is always handled.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            loop.add_signal_handler(number, signals.put_nowait, number)
    client = EngineClient(engine_config, logs=settings.logs, loading_seconds=settings.loading_seconds)
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
        app = create_app(settings, client, keys, traces, admin_keys)
        log_access(settings, keys)
        with closing(app.state.grammars):
            await _serve_until_signal(settings, client, app, port, tls, signals)
    except EngineStartError as error:
        raise ServeError(str(error)) from error
    finally:
        await client.stop()
        if traces:
            await traces.close()


async def _serve_until_signal(
    settings: ServerSettings,
    client: EngineClient,
    app: FastAPI,
    port: socket.socket,
    tls: ssl.SSLContext | None,
    signals: "asyncio.Queue[signal.Signals]",
) -> None:
    gate: Gate = app.state.gate
    server = HttpServer(app, settings, port, tls, client.limits.name)
    serving = asyncio.create_task(server.serve())
    first = asyncio.create_task(signals.get())
    await asyncio.wait({serving, first}, return_when=asyncio.FIRST_COMPLETED)
    if not serving.done():
        gate.drain(for_good=True)
        log.info("%s: draining for up to %g s", first.result().name, settings.drain_seconds)
        idle, second = asyncio.create_task(gate.wait_idle()), asyncio.create_task(signals.get())
        await asyncio.wait({serving, idle, second}, timeout=settings.drain_seconds, return_when=asyncio.FIRST_COMPLETED)
        if not idle.done():
            log.warning("requests are cut off")
            # Each request gets an error, as its last event if it streams.
            await client.stop()
        server.should_exit, server.force_exit = True, second.done()
        idle.cancel()
        second.cancel()
    first.cancel()
    try:
        await serving
    except OSError as error:
        raise _cannot_listen(settings, error) from error


class HttpServer(uvicorn.Server):
    """uvicorn's server, with our own listener and connections."""

    def __init__(
        self, app: FastAPI, settings: ServerSettings, bound: socket.socket, tls: ssl.SSLContext | None, model: str
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                log_config=None,
                log_level=max(logging.WARNING, log.getEffectiveLevel()),
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=LAST_RESPONSES_SECONDS,
            )
        )
        self._settings = settings
        self._bound = bound
        self._tls = tls
        self._model = model

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Opens the port. Raises OSError."""
        settings, app = self._settings, self.config.app
        assert isinstance(app, FastAPI)
        connections: Connections = app.state.connections
        connections.fit_to_open_files()
        limits = HttpLimits.of(settings)
        listener = Listener(
            self._bound,
            self._tls,
            settings.head_timeout,
            settings.retry_after,
            connections,
            lambda slot, accepted: HttpConnection(app, limits, connections, slot, accepted, self.server_state),
        )
        listener.start()
        # uvicorn only closes it and waits for that.
        self.servers = [listener]  # type: ignore[list-item]
        self.started = True
        # Logged only now: a program that reads it may connect.
        host, number = self._bound.getsockname()[:2]
        line = "serving %s on https://%s:%d" if self._tls else "serving %s on http://%s:%d"
        log.info(line, self._model, f"[{host}]" if ":" in host else host, number)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are handled above. The first one must not close the port, which still answers that the server
        drains."""
        yield


def log_installed(config: EngineConfig) -> None:
    """Logs the installed versions: after the settings are checked, before the model is loaded."""
    here = installed()
    kernels = config.kernels or here.preferred(config.device)
    versions = ", ".join(f"{name} {value}" for name, value in here.rows().items())
    log.info("%s, kernels %s", versions, here.detailed(kernels), extra=asdict(here) | {"kernels": kernels})


def log_access(settings: ServerSettings, keys: tuple[bytes, ...]) -> None:
    """Logs whether API keys are required."""
    if keys:
        log.info("%d API key%s", len(keys), "s" if len(keys) > 1 else "")
    else:
        level = logging.INFO if _is_loopback(settings.host) else logging.WARNING
        log.log(level, "no API keys: open to all who reach it")


def make_traces(settings: ServerSettings) -> "Traces | None":
    """None unless traces are configured. Raises ServeError."""
    named = [name for name in OTLP_ENDPOINTS if os.environ.get(name)]
    asked = [f"--otlp-endpoint {settings.otlp_endpoint}"] if settings.otlp_endpoint else named
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if not asked or disabled or os.environ.get("OTEL_TRACES_EXPORTER") == "none":
        return None
    try:
        from .telemetry import Traces

        return Traces(settings.otlp_endpoint, installed().version)
    except ImportError as error:
        raise ServeError(f'{asked[0]} asks for traces, which need fastblt\'s extra "traces" ({error})') from error
    except ValueError as error:
        raise ServeError(f"traces: {error}") from error


def _localised(config: EngineConfig) -> EngineConfig:
    """Replaces names on the hub by local folders, downloading if needed. Raises ServeError."""
    try:
        return localised(config)
    except HubError as error:
        raise ServeError(str(error)) from error


def _bind(settings: ServerSettings) -> socket.socket:
    """Raises ServeError."""
    try:
        return bind(settings.host, settings.port)
    except OSError as error:
        raise _cannot_listen(settings, error) from error


def _cannot_listen(settings: ServerSettings, error: OSError) -> ServeError:
    return ServeError(f"cannot listen on port {settings.port} of host {settings.host}: {error.strerror or error}")


def load_keys(settings: ServerSettings) -> tuple[bytes, ...]:
    """Raises ServeError."""
    return _load(settings.load_api_keys, "--api-key-file", settings.api_key_file)


def load_admin_keys(settings: ServerSettings) -> tuple[bytes, ...]:
    """Raises ServeError."""
    return _load(settings.load_admin_keys, "--admin-key-file", settings.admin_key_file)


def _load(load: Callable[[], tuple[bytes, ...]], flag: str, file: Path | str | None) -> tuple[bytes, ...]:
    try:
        return load()
    except OSError as error:
        raise ServeError(f"{flag} {file}: {error.strerror or error}") from error
    except ValueError as error:
        raise ServeError(f"{flag} {error}") from error


def _make_tls(settings: ServerSettings) -> ssl.SSLContext | None:
    """Raises ServeError."""
    try:
        return make_context(settings)
    except ValueError as error:
        raise ServeError(str(error)) from error


def _is_loopback(host: str) -> bool:
    address = parse_address(host)
    return address.is_loopback if address else host == "localhost"
