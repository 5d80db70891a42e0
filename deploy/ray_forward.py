"""What an ingress does with a request, whatever carries it to a replica: reads it, counts it, and relays the answer."""

import asyncio
import itertools
import logging
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from server.access_log import Access
from server.admission import Gate
from server.body import ClientLeft, read_body
from server.body_room import HeldBody
from server.errors import ApiError, internal_error, request_timeout
from server.keys import KeyRing
from server.middleware import OPEN_PATHS, client_address, digest_of
from server.origin import Origin
from server.parsing import off_the_loop
from server.settings import ServerSettings

from .ray_balance import Balance
from .ray_call import Call, decode_reply
from .ray_relay import Relay, ReplicaFailed
from .ray_settings import RaySettings
from .ray_work import work_of

log = logging.getLogger("fastblt.ingress")

SENT = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client", "server")
"""The parts of a request that are sent to a replica, besides its body."""
COMPLETIONS = "/v1/completions"

Carry = Callable[[Call], AsyncGenerator[bytes, None]]
"""Sends a call to the replica that the balance chooses, and gives its replies. Raises ReplicaLost, ReplicaFailed,
NoRoom."""


class Forwarder:
    """The requests of one ingress. `gate` counts them."""

    def __init__(
        self, settings: ServerSettings, options: RaySettings, keys: KeyRing, balance: Balance, carry: Carry
    ) -> None:
        """balance: what the ingress knows of the replicas."""
        self.gate = Gate(settings)
        self._settings = settings
        self._options = options
        self._keys = keys
        self._balance = balance
        self._carry = carry
        self._numbers = itertools.count()

    async def forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request. Raises ApiError if nothing was sent yet."""
        self._check_key(scope)
        ticket = self.gate.enter(0)
        try:
            with self.gate.bodies.enter() as held:
                body = await self._read(Request(scope, receive), held)
                if scope["path"] == COMPLETIONS:
                    self._check_room()
                    work = await off_the_loop(body, lambda: work_of(body, self._settings.max_choices))
                    call = Call(_sent(scope), body, next(self._numbers), work, origin=Origin())
                else:
                    call = Call(_sent(scope), body, next(self._numbers))
            await self._relay(call, send)
        except ClientLeft:
            pass
        finally:
            ticket.close()

    async def metrics_of(self, replica: str, scope: Scope, send: Send) -> None:
        """Answers with `/metrics` of one replica. Raises ApiError if nothing was sent yet."""
        sent = _sent(scope) | {"path": "/metrics", "raw_path": b"/metrics"}
        await self._relay(Call(sent, b"", next(self._numbers), replica=replica), send)

    def _check_key(self, scope: Scope) -> None:
        """As each replica does, but before the body is read. Raises ApiError 401, and logs it."""
        if not len(self._keys) or OPEN_PATHS.fullmatch(scope["path"]):
            return
        try:
            digest_of(scope, self._keys)
        except ApiError as error:
            headers = Headers(scope=scope)
            peer, _ = scope.get("client") or ("-", 0)
            client = client_address(peer, headers.getlist("x-forwarded-for"), self._settings.trusted_proxies)
            path = scope["path"].encode("unicode_escape").decode()
            access = Access(headers.get("x-request-id", "-"), scope["method"], path, client, status=401, error=error)
            access.write()
            raise

    def _check_room(self) -> None:
        """Raises ApiError 429 while every replica's queue is full."""
        if (seconds := self._balance.full()) is not None:
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
        wait, keepalive = self._options.replica_wait, self._settings.keepalive_seconds
        relay = Relay(self._ask, send, wait=wait, keepalive=keepalive, unavailable=self.gate.unavailable)
        try:
            await relay.run(call)
        except ReplicaFailed:
            log.exception("the request failed")
            if relay.has_begun:
                raise
            raise internal_error(dict(call.scope["headers"])[b"x-request-id"].decode()) from None

    async def _ask(self, call: Call) -> AsyncGenerator[str | list[Message], None]:
        """As `Relay` wants it."""
        name = ""
        self._balance.begun(call.number)
        try:
            async with aclosing(self._carry(call)) as replies:
                async for encoded in replies:
                    reply = decode_reply(encoded)
                    name = reply.replica or name
                    if reply.load:
                        self._balance.heard(name, reply.load)
                    if reply.replica:
                        # The report that came with it does not count the call yet.
                        self._balance.sent(call.number, call.work, name)
                        yield name
                    if reply.messages:
                        if reply.messages[0].get("status", 200) != 200:
                            self._balance.refused(call.number)
                        yield reply.messages
        finally:
            self._balance.ended(call.number)


def _sent(scope: Scope) -> dict[str, Any]:
    return {name: scope[name] for name in SENT} | {"asgi": {"version": "3.0", "spec_version": "2.3"}, "root_path": ""}
