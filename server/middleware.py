"""What happens around every request, as plain ASGI: an id, a key, a log line, and an answer whatever breaks."""

import hashlib
import hmac
import logging
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .body import ClientLeft
from .errors import ApiError, internal_error
from .metrics import Metrics

log = logging.getLogger("fastblt.server")
access_log = logging.getLogger("fastblt.access")

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
OPEN_PATHS = re.compile(r"/|/page/[^/]+|/health/(live|ready)|/metrics")
CLIENT_LEFT = 499
"""In logs and metrics, as nginx has it; nobody receives it."""


class RequestContext:
    """Gives each request an id (the client's x-request-id, if it is fit), one access log line, and a clean 500."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        start = time.perf_counter()
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(8)}"
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0
        self._metrics.in_progress.inc()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientLeft:
            status = CLIENT_LEFT
        except Exception:
            log.exception("request %s failed", request_id)
            if status:
                raise
            await internal_error(request_id).response()(scope, receive, send_with_id)
        finally:
            self._metrics.in_progress.dec()
            route = getattr(scope.get("route"), "path", "unmatched")
            self._metrics.http_responses.labels(route, status).inc()
            milliseconds = (time.perf_counter() - start) * 1000
            path = scope["path"].encode("unicode_escape").decode()
            client = (scope.get("client") or ("-",))[0]
            access_log.info(
                "%s %s %s %d %.1fms %s", client, scope["method"], path[:200], status, milliseconds, request_id
            )


class ApiKeys:
    """Refuses requests without one of the keys, except for the page, health and metrics."""

    def __init__(self, app: ASGIApp, keys: tuple[bytes, ...]) -> None:
        self._app = app
        # Digests have one length, so that comparing them tells nothing of the keys.
        self._digests = [hashlib.sha256(key).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not OPEN_PATHS.fullmatch(scope["path"]):
            scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
            # All are compared, so that the time does not tell which one is near.
            if scheme.lower() != "bearer" or not sum(hmac.compare_digest(digest, known) for known in self._digests):
                what = "the API key is not valid" if key else "send an API key as 'Authorization: Bearer KEY'"
                error = ApiError(401, what, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
                return await error.response()(scope, receive, send)
        await self._app(scope, receive, send)
