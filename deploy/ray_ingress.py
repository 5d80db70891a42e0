"""The ingress between Ray's HTTP proxies and the replicas: it reads a request, lets the router choose a replica by the
beginning of its prompt, and relays the answer as it comes. If a replica is lost, another continues its completions.
"""

import asyncio
import itertools
import logging
import math
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
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine import logs
from server.admission import Gate
from server.body import ClientLeft, read_body
from server.body_room import HeldBody
from server.errors import ApiError, internal_error, request_timeout
from server.origin import Origin
from server.responses import JsonResponse
from server.settings import ServerSettings

from .ray_balance import BALANCE
from .ray_call import Call, decode_reply
from .ray_relay import NoRoom, Relay, ReplicaLost
from .ray_settings import RaySettings
from .ray_work import work_of

log = logging.getLogger("fastblt.ingress")

SENT = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client", "server")
"""The parts of a request that are sent to a replica, besides its body."""
COMPLETIONS = "/v1/completions"
STATE_SECONDS = 5.0
"""Seconds that replicas have to report their state."""


@serve.ingress()
class Ingress:
    """The application that clients see. `/health`, `/replicas` and `/metrics` are about all replicas; every other route
    is answered by one replica, which also checks keys."""

    def __init__(self, replicas: DeploymentHandle, settings: ServerSettings, options: RaySettings) -> None:
        logs.configure(settings.logs, "ingress")
        self._replicas = replicas
        self._answer = replicas.options(method_name="answer", stream=True)
        self._settings = settings
        self._options = options
        self._gate = Gate(settings)
        self._is_cut_off = False
        self._numbers = itertools.count()

    async def drain(self) -> None:
        """Refuses new requests and waits for those under way, as `fastblt serve` does on SIGTERM."""
        self._gate.drain(for_good=True)
        try:
            async with asyncio.timeout(self._settings.drain_seconds):
                await self._gate.wait_idle()
        except TimeoutError:
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
                Mount("", self._forward),
            ],
            exception_handlers={ApiError: _on_api_error},
        )

        async def without_slash(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                scope["path"] = scope["path"].rstrip("/") or "/"
            await app(scope, receive, send)

        return without_slash

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
        replica = request.path_params["replica"]
        scope = _sent(request.scope) | {"path": "/metrics", "raw_path": b"/metrics"}
        call = Call(scope, b"", next(self._numbers), replica=replica)
        return _Relayed(self, call)

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

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        ticket = self._gate.enter(0)
        try:
            with self._gate.bodies.enter() as held:
                body = await self._read(Request(scope, receive), held)
                if scope["path"] == COMPLETIONS:
                    self._check_room()
                    call = Call(_sent(scope), body, next(self._numbers), work_of(body), origin=Origin())
                else:
                    call = Call(_sent(scope), body, next(self._numbers))
            await self._relay(call, send)
        except ClientLeft:
            pass
        finally:
            ticket.close()

    def _check_room(self) -> None:
        """Raises ApiError 429 while every replica's queue is full."""
        if (seconds := BALANCE.full()) is not None:
            headers = {"retry-after": str(max(math.ceil(seconds), self._settings.retry_after))}
            why = "the queues of all replicas are full; try again later"
            raise ApiError(429, why, code="queue_full", headers=headers)

    async def _read(self, request: Request, held: HeldBody) -> bytes:
        """The body of a request. Ray's proxy has read its head, and does not time the rest."""
        seconds = self._settings.request_timeout
        try:
            async with asyncio.timeout(seconds):
                return await read_body(request, self._settings, held)
        except TimeoutError:
            raise request_timeout(seconds) from None

    async def _relay(self, call: Call, send: Send) -> None:
        """Raises ApiError if nothing was sent yet."""
        wait, keepalive = self._options.replica_wait, self._settings.keepalive_seconds
        relay = Relay(self._ask, send, wait=wait, keepalive=keepalive, unavailable=self._gate.unavailable)
        try:
            await relay.run(call)
        except RayTaskError:
            log.exception("the request failed")
            if relay.has_begun:
                raise
            raise internal_error(dict(call.scope["headers"])[b"x-request-id"].decode()) from None

    async def _ask(self, call: Call) -> AsyncGenerator[str | list[Message], None]:
        """As `Relay` wants it. An exception of the application is a RayTaskError."""
        if self._is_cut_off:
            raise self._gate.unavailable("the server is shutting down", "draining")
        answer, name = self._answer.remote(call), ""
        try:
            async for encoded in answer:
                reply = decode_reply(encoded)
                if reply.replica:
                    name = reply.replica
                    BALANCE.sent(call.number, call.work, name)
                    yield name
                if reply.load:
                    BALANCE.heard(name, reply.load)
                if reply.messages:
                    yield reply.messages
        except (BackPressureError, DeploymentUnavailableError):
            raise NoRoom from None
        except RayTaskError:
            raise
        except RayError as error:
            # Not cancelled: Ray would wait for a machine that is gone.
            raise ReplicaLost(type(error).__name__) from error
        except BaseException:
            answer.cancel()
            raise
        finally:
            BALANCE.ended(call.number)


class _Relayed(Response):
    """A route's answer that comes from a replica."""

    def __init__(self, ingress: Ingress, call: Call) -> None:
        self._ingress = ingress
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._ingress._relay(self._call, send)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


def _sent(scope: Scope) -> dict[str, Any]:
    return {name: scope[name] for name in SENT} | {"asgi": {"version": "3.0", "spec_version": "2.3"}, "root_path": ""}


def _target(state: dict[str, Any], address: str) -> dict[str, Any]:
    """Prometheus drops labels that begin with `__meta` unless it is configured to relabel them."""
    labels = {"instance": state["replica"], "__metrics_path__": f"/replicas/{state['replica']}/metrics"}
    return {"targets": [address], "labels": labels | {f"__meta_fastblt_{name}": str(v) for name, v in state.items()}}
