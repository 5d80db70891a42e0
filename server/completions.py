"""`POST /v1/completions`: the body, the admission, and the response as a whole or as a stream."""

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from pydantic import ValidationError
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .access import Access
from .body import ClientLeft, read_body
from .choice import Piece
from .errors import ApiError, from_validation, internal_error
from .generation import Generation, Service
from .plan import make_plan
from .responses import JsonResponse, to_json
from .schemas import CompletionRequest, NotOffered

log = logging.getLogger("fastblt.server")

T = TypeVar("T")


async def complete(request: Request, service: Service) -> Response:
    """The whole life of one request. Raises ApiError."""
    body = await read_body(request, service.settings)
    service.gate.check_open()
    wanted = parse(body)
    completion_id = f"cmpl-{secrets.token_hex(12)}"
    plan = make_plan(wanted, completion_id, service.settings, service.client.limits)
    if service.client.state == "dead":
        raise service.gate.unavailable("the engine is gone and will not come back", "engine_dead")
    generation = Generation(service, plan, completion_id, service.gate.enter(len(plan.requests)))
    request.state.access.generation = generation
    handed_over = False
    try:
        if not wanted.stream:
            return JsonResponse(await _unless_client_leaves(request, generation.collect()))
        pieces = generation.pieces()
        # What fails at once fails with a status of its own; behind the first event there is only 200.
        first = await _unless_client_leaves(request, anext(pieces))
        handed_over = True
        return CompletionStream(generation, first, pieces, request.state.access)
    finally:
        if not handed_over:
            await generation.close()


def parse(body: bytes) -> CompletionRequest:
    """Raises ApiError 400."""
    try:
        return CompletionRequest.model_validate_json(body)
    except NotOffered as error:
        raise ApiError(400, str(error), param=error.field, code="unsupported_parameter") from None
    except ValidationError as error:
        try:
            body.decode()
        except UnicodeDecodeError as flaw:
            message = f"the body is not valid UTF-8: {flaw.reason} at byte {flaw.start}"
            raise ApiError(400, message, code="invalid_json") from None
        raise from_validation(error) from None


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
    ) -> None:
        super().__init__(self._events(first, rest), headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._generation = generation
        self._access = access
        self._sent_all = False
        options = generation.plan.request.stream_options
        self._include_usage = options is not None and options.include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
            self._access.client_left = not self._sent_all
        finally:
            await self._generation.close()

    async def _events(
        self, first: tuple[int, Piece] | None, rest: AsyncGenerator[tuple[int, Piece] | None, None]
    ) -> AsyncGenerator[bytes, None]:
        try:
            if chunk := self._chunk(first):
                yield chunk
            async for item in rest:
                if chunk := self._chunk(item):
                    yield chunk
            if self._include_usage:
                yield _event(self._generation.completion([], with_usage=True))
        except ApiError as error:
            yield self._error(error)
        except Exception:
            log.exception("the request failed")
            yield self._error(internal_error(self._access.request_id))
        yield format_sse_event(data_str="[DONE]")
        self._sent_all = True

    def _error(self, error: ApiError) -> bytes:
        self._access.error = error
        return _event(error.body)

    def _chunk(self, item: tuple[int, Piece] | None) -> bytes | None:
        """None for a piece that says nothing: its bytes wait for the rest of a code point, or for a stop string."""
        if item is None:
            return KEEPALIVE_COMMENT
        index, piece = item
        if piece.is_empty:
            return None
        return _event(self._generation.completion([self._generation.choice(index, piece)], with_usage=False))


def _event(content: Any) -> bytes:
    return format_sse_event(data_str=to_json(content).decode())
