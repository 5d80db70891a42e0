"""`POST /v1/completions`: the body, the admission, and the response as a whole or as a stream."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable
from typing import TypeVar

from fastapi import Request
from fastapi.sse import EventSourceResponse
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .access_log import Access
from .body import ClientLeft, check_content, read_body
from .choice import Piece
from .errors import ApiError, internal_error
from .generation import Generation, Service
from .origin import Origin, origin_of
from .parsing import off_the_loop, parse
from .requests import Plan, make_plan
from .responses import JsonResponse, to_json, to_json_in_turns
from .structured import refusal

log = logging.getLogger("fastblt.server")

T = TypeVar("T")

LINE_BREAKS = {c.encode(): b"\\u%04x" % ord(c) for c in "\u0085\u2028\u2029"}
"""Those of Unicode, which JSON leaves as they are and the lines of httpx and requests end at, and their escapes."""

KEEPALIVE = b"\n\n"
"""Sent in a silent stream. Every reader of events ignores empty lines. Not all ignore comments: vLLM's benchmark takes
one for the start of the next event, SGLang's for broken JSON."""


async def complete(request: Request, service: Service) -> Response:
    """The whole life of one request. Raises ApiError."""
    check_content(request)
    origin = origin_of(request.scope)
    access: Access = request.state.access
    access.passes_on = origin.passes_on
    _check_model(origin, service)
    # On an open server all clients are one tenant.
    api_key: bytes = request.scope["state"].get("api_key", b"")
    plan = await _understood(request, service, origin, api_key)
    wanted = plan.request
    # An engine that has begun it has compiled them. Here it may take too long, on a busy machine.
    if not (origin.shown or origin.held):
        await _check_grammars(request, service, plan, api_key)
    service.check_engine()
    if origin.is_continued:
        service.metrics.continued.inc()
    ticket = service.gate.enter(
        len(plan.requests), api_key, plan.prompt_bytes, wanted.priority, is_admitted=origin.is_continued
    )
    access.generation = generation = Generation(service, plan, origin, ticket, access.started, access.received)
    handed_over = False
    try:
        if not wanted.stream:
            body = await to_json_in_turns(await _unless_client_leaves(request, generation.collect()))
            handed_over = True
            return CompletionAnswer(generation, body)
        request.scope["state"]["unread_bytes"] = generation.unread_bytes
        pieces = generation.pieces()
        # A request that fails at once gets its own status; after the first event there is only 200.
        first = await _unless_client_leaves(request, anext(pieces, None))
        handed_over = True
        return CompletionStream(generation, first, pieces, access, service.settings.keepalive_seconds)
    finally:
        if not handed_over:
            await generation.close()


def _check_model(origin: Origin, service: Service) -> None:
    """Raises ApiError 503 for a completion that another model began."""
    if origin.model not in ("", service.client.limits.fingerprint):
        others = "those that are left run another model, or on another kind of processor"
        why = f"the replica that ran this request is gone, and {others}; send it again"
        raise service.gate.unavailable(why, "replica_lost")


async def _understood(request: Request, service: Service, origin: Origin, api_key: bytes) -> Plan:
    settings, limits = service.settings, service.client.limits
    with service.gate.bodies.enter() as held:
        body = await read_body(request, settings, held)
        request.state.access.received = time.perf_counter()
        if not origin.is_continued:
            service.gate.check(api_key)

        def understand() -> Plan:
            asked = parse(body, settings.max_choices, limits.max_length)
            return make_plan(asked, origin, settings, limits, api_key)

        return await off_the_loop(body, understand)


async def _check_grammars(request: Request, service: Service, plan: Plan, api_key: bytes) -> None:
    """Raises ApiError 400 for a grammar that does not compile, 429 if too many wait for that."""
    for grammar in plan.constraint.checked if plan.constraint else ():
        fault = await _unless_client_leaves(request, service.grammars.fault(grammar.text, api_key))
        if fault:
            raise refusal(grammar.fault(fault))


async def _unless_client_leaves(request: Request, work: Awaitable[T]) -> T:
    """The framework does not cancel a request whose client is gone. Raises ClientLeft."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        for pending in (task, watch):
            pending.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


class CompletionAnswer(JsonResponse):
    """A whole response. It owns the generation, which is closed when its last byte is sent, or will never be."""

    def __init__(self, generation: Generation, body: bytes) -> None:
        super().__init__(body)
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._generation.close()


class CompletionStream(EventSourceResponse):
    """Server-sent events, one chunk per piece. It owns the generation: however it ends, that is closed.

    A response and not a generator endpoint, because the same route also answers with plain JSON.
    """

    def __init__(
        self,
        generation: Generation,
        first: tuple[int, Piece] | None,
        rest: AsyncGenerator[tuple[int, Piece] | None, None],
        access: Access,
        keepalive_seconds: float,
    ) -> None:
        super().__init__(self._events(first, rest), headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._generation = generation
        self._access = access
        self._sent_all = False
        self._keepalive_seconds = keepalive_seconds
        self._spoke = time.monotonic()
        """When something was sent last, or the answer was begun."""
        options = generation.plan.request.stream_options
        self._include_usage = options is not None and options.include_usage
        self._usage_in_chunks = options is not None and options.continuous_usage_stats

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
            self._access.client_left = not self._sent_all
        finally:
            await self._generation.close()

    async def _events(
        self, first: tuple[int, Piece] | None, rest: AsyncGenerator[tuple[int, Piece] | None, None]
    ) -> AsyncGenerator[bytes, None]:
        last = b""
        try:
            if chunk := await self._chunk(first):
                yield chunk
            async for item in rest:
                if chunk := await self._chunk(item):
                    yield chunk
            if self._include_usage:
                last = _event(to_json(self._generation.completion([], self._generation.usage())))
        except ApiError as error:
            last = self._error(error)
        except Exception:
            log.exception("the request failed")
            last = self._error(internal_error(self._access.request_id))
        # As one piece: what comes after the text is sent as a whole or not at all.
        yield last + _event(b"[DONE]")
        self._sent_all = True

    def _error(self, error: ApiError) -> bytes:
        self._access.error = error
        return _event(to_json(error.body))

    async def _chunk(self, item: tuple[int, Piece] | None) -> bytes | None:
        """None for an empty piece, unless nothing was sent for long: its bytes wait for the rest of a code point, or
        for a stop string, or its ids are no bytes."""
        now = time.monotonic()
        if item and item[1].is_empty and now - self._spoke < self._keepalive_seconds:
            return None
        self._spoke = now
        if item is None or item[1].is_empty:
            return KEEPALIVE
        index, piece = item
        generation = self._generation
        usage = generation.usage_so_far() if self._usage_in_chunks else None
        chunk = generation.completion([generation.choice(index, piece)], usage)
        return _event(await to_json_in_turns(chunk) if piece.is_scored else to_json(chunk))


def _event(data: bytes) -> bytes:
    for character, escape in LINE_BREAKS.items():
        data = data.replace(character, escape)
    return b"data: %b\n\n" % data
