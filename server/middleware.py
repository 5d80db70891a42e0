"""Surrounds every request, as plain ASGI: id, key check, log line, and an answer to every failure."""

import logging
import re
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import IPvAnyNetwork
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine import logs

from .access_log import CLIENT_LEFT, Access
from .addresses import is_in, parse_address
from .body import ClientLeft
from .errors import ApiError, internal_error
from .keys import KeyRing
from .metrics import Metrics

if TYPE_CHECKING:
    from .telemetry import Traces

log = logging.getLogger("fastblt.server")

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
ADMIN_PATHS = "/admin/"
OPEN_PATHS = re.compile(r"/|/page/[^/]+|/health|/health/(live|ready)|/ping|/metrics")


class RequestContext:
    """Gives each request an id (the client's x-request-id, if valid), the client's address, a line in the log, and
    a span if traces are on. A trailing slash in a path is ignored."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        trusted_proxies: Sequence[IPvAnyNetwork] = (),
        traces: "Traces | None" = None,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._trusted_proxies = trusted_proxies
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(8)}"
        path = scope["path"].encode("unicode_escape").decode()
        scope["path"] = scope["path"].rstrip("/") or "/"
        peer, port = scope.get("client") or ("-", 0)
        client = client_address(peer, headers.getlist("x-forwarded-for"), self._trusted_proxies)
        scope["client"] = (client, port)
        access = Access(request_id, scope["method"], path, client)
        scope.setdefault("state", {})["access"] = access
        fields = {"request_id": request_id}
        span = None
        if self._traces and not access.is_probe:
            span = self._traces.start(scope)
            fields |= self._traces.log_fields(span)
        token = logs.context.set(fields)
        self._metrics.in_progress.inc()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                access.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            access.has_begun |= message["type"] == "http.response.body"
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientLeft:
            access.client_left = True
            if not access.has_begun:
                access.status = CLIENT_LEFT
        finally:
            access.end(getattr(scope.get("route"), "path", None))
            self._metrics.in_progress.dec()
            self._metrics.responded(access)
            access.write()
            if self._traces and span:
                self._traces.end(span, access)
            logs.context.reset(token)


def client_address(peer: str, forwarded: Sequence[str], trusted: Sequence[IPvAnyNetwork]) -> str:
    """The address of the client: the nearest one that is not a trusted proxy's, going back from the peer through
    X-Forwarded-For. Each entry was written by the proxy after it, so any entry before an invalid or untrusted address
    may be forged."""
    client = parse_address(peer)
    for entry in [part.strip() for line in forwarded for part in line.split(",")][::-1]:
        before = parse_address(entry)
        if not before or not is_in(client, trusted):
            break
        client = before
    return str(client or "-")


class Failures:
    """Answers requests that the connection refuses and exceptions of the application, so that both get the headers of
    the outer layers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        state = scope["state"]
        access: Access = state["access"]
        error: ApiError | None = state.get("refusal")
        if not error:
            try:
                return await self._app(scope, receive, send)
            except ClientLeft:
                raise
            except Exception:
                log.exception("the request failed")
                error = internal_error(access.request_id)
        access.error = error
        # An answer that has started breaks off instead.
        if not access.has_begun:
            await error.response()(scope, receive, send)


class Keys:
    """Refuses requests without one of the keys, except for the page, health and metrics. Leaves the digest of a
    request's API key in its state. The operator's routes, if there are any, need an admin key instead."""

    def __init__(self, app: ASGIApp, keys: KeyRing, admin_keys: KeyRing) -> None:
        """keys: without any, all other routes are open. admin_keys: without any, there are no such routes."""
        self._app = app
        self._keys = keys
        self._admin_keys = admin_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # An unparsed request may have lost its key; it is refused anyway.
        if scope["type"] == "http" and "refusal" not in scope["state"]:
            is_admin = len(self._admin_keys) > 0 and scope["path"].startswith(ADMIN_PATHS)
            keys, kind = (self._admin_keys, "admin") if is_admin else (self._keys, "API")
            if len(keys) and not OPEN_PATHS.fullmatch(scope["path"]):
                try:
                    digest = digest_of(scope, keys, kind)
                except ApiError as error:
                    scope["state"]["access"].error = error
                    return await error.response()(scope, receive, send)
                if not is_admin:
                    scope["state"]["api_key"] = digest
        await self._app(scope, receive, send)


def digest_of(scope: Scope, keys: KeyRing, kind: str = "API") -> bytes:
    """Of a request's key. Raises ApiError 401 for one that is none of these, or missing."""
    scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
    digest = keys.find(key.strip().encode("latin-1"))
    if scheme.lower() == "bearer" and digest:
        return digest
    what = f"the {kind} key is not valid" if key else f"send an {kind} key as 'Authorization: Bearer KEY'"
    raise ApiError(401, what, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def with_cors(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Lets pages of these origins call the application."""
    headers = ["x-request-id", "retry-after"]
    return CORSMiddleware(app, allow_origins=origins, allow_methods=["*"], allow_headers=["*"], expose_headers=headers)
