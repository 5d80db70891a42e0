"""The ingress between Ray's HTTP proxies and the replicas: it reads a request, lets the router choose a replica by the
beginning of its prompt, and relays the answer as it comes. If a replica is lost, another continues its completions.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from engine import logs
from server.errors import ApiError
from server.keys import KeyRing
from server.middleware import with_cors
from server.responses import JsonResponse
from server.settings import ServerSettings

from .ray_balance import BALANCE
from .ray_call import Call
from .ray_forward import Forwarder
from .ray_relay import NoRoom, ReplicaFailed, ReplicaLost
from .ray_settings import RaySettings

log = logging.getLogger("fastblt.ingress")

STATE_SECONDS = 5.0
"""Seconds that replicas have to report their state."""


@serve.ingress()
class Ingress:
    """The application that clients see. `/health`, `/replicas` and `/metrics` are about all replicas; every other route
    is answered by one replica, once the key was checked, and again there."""

    def __init__(self, replicas: DeploymentHandle, settings: ServerSettings, options: RaySettings) -> None:
        logs.configure(settings.logs, "ingress")
        self._replicas = replicas
        self._answer = replicas.options(method_name="answer", stream=True)
        self._settings = settings
        keys = KeyRing("API keys", settings.load_api_keys(), settings.api_key_file, settings.load_api_keys)
        self._forwarder = Forwarder(settings, options, keys, BALANCE, self._carry)
        self._gate = self._forwarder.gate
        self._is_cut_off = False

    async def drain(self) -> None:
        """Refuses new requests and waits for those under way, as `fastblt serve` does on SIGTERM."""
        self._gate.drain(for_good=True)
        try:
            async with asyncio.timeout(self._settings.drain_seconds):
                await self._gate.wait_idle()
        except TimeoutError:
            await self.cut_off()

    async def cut_off(self) -> None:
        """Ends the requests under way, each with an error."""
        log.warning("requests are cut off")
        self._is_cut_off = True
        await self._replicas.broadcast("stop").results_async(return_exceptions=True)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        app = Starlette(
            routes=[
                Route("/health/live", self._live),
                Route("/health/ready", self._ready),
                Route("/health", self._ready),
                Route("/ping", self._ready),
                Route("/replicas", self._list),
                Route("/replicas/{replica}/metrics", self._replica_metrics),
                Route("/metrics", self._metrics),
                Mount("", self._forwarder.forward),
            ],
            exception_handlers={ApiError: _on_api_error},
        )

        async def without_slash(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                scope["path"] = scope["path"].rstrip("/") or "/"
            await app(scope, receive, send)

        origins = self._settings.cors_origins
        return with_cors(without_slash, origins) if origins else without_slash

    async def _live(self, request: Request) -> Response:
        """Always 200: Ray itself restarts replicas and ingresses."""
        return JsonResponse({"status": "live"})

    async def _ready(self, request: Request) -> Response:
        """503 unless some replica's engine runs."""
        self._gate.check_open()
        # A replica that hangs delays the others' answers; these should still get requests.
        with suppress(TimeoutError):
            if not any(state["engine"] == "ready" for state in await self._states()):
                raise self._gate.unavailable("no replica is ready", "no_replica")
        return JsonResponse({"status": "ready"})

    async def _list(self, request: Request) -> Response:
        """The replicas, as Prometheus' HTTP service discovery reads it; after an error it keeps the last list."""
        try:
            return JsonResponse([_target(state, request.url.netloc) for state in await self._states()])
        except TimeoutError:
            raise self._gate.unavailable("a replica does not answer", "no_replica") from None

    async def _replica_metrics(self, request: Request) -> Response:
        """`/metrics` of one replica."""
        return _MetricsOf(self._forwarder, request.path_params["replica"])

    async def _metrics(self, request: Request) -> Response:
        raise ApiError(404, "every replica has its own metrics: see GET /replicas", code="unknown_url")

    async def _states(self) -> list[dict[str, Any]]:
        """The state of all replicas. Raises TimeoutError if one does not answer."""
        try:
            async with asyncio.timeout(STATE_SECONDS):
                states = await self._replicas.broadcast("state").results_async(return_exceptions=True)
        except DeploymentUnavailableError:
            return []
        return [state for state in states if isinstance(state, dict)]

    async def _carry(self, call: Call) -> AsyncGenerator[bytes, None]:
        """As the forwarder wants it."""
        if self._is_cut_off:
            raise self._gate.unavailable("the server is shutting down", "draining")
        answer = self._answer.remote(call)
        try:
            async for encoded in answer:
                yield encoded
        except (BackPressureError, DeploymentUnavailableError):
            raise NoRoom from None
        except RayTaskError as error:
            raise ReplicaFailed from error
        except RayError as error:
            # Not cancelled: Ray would wait for a machine that is gone.
            raise ReplicaLost(type(error).__name__) from error
        except BaseException:
            answer.cancel()
            raise


class _MetricsOf(Response):
    """A route's answer that comes from a replica."""

    def __init__(self, forwarder: Forwarder, replica: str) -> None:
        self._forwarder = forwarder
        self._replica = replica

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._forwarder.metrics_of(self._replica, scope, send)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


def _target(state: dict[str, Any], address: str) -> dict[str, Any]:
    """Prometheus drops labels that begin with `__meta` unless it is configured to relabel them."""
    labels = {"instance": state["replica"], "__metrics_path__": f"/replicas/{state['replica']}/metrics"}
    return {"targets": [address], "labels": labels | {f"__meta_fastblt_{name}": str(v) for name, v in state.items()}}
