"""The ingress's half of an answer: passes it on to the client, and has another replica continue it if one is lost.

The next replica gets the request with all ids that came so far, as a new engine does from `EngineClient`, and with the
same seed. A place of the output has the same draw everywhere, so the client sees a pause and then the same bytes.

NVIDIA's Dynamo also moves the requests of a lost worker, with its tokens as a longer prompt; its documentation says
nothing of the draws after them.
"""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import orjson
from fastapi.sse import format_sse_event
from starlette.types import Message, Send

from server.completions import KEEPALIVE
from server.errors import ApiError, Code
from server.origin import Origin
from server.responses import to_json

from .ray_answer import MODEL, ONLY_TOLD, TOLD
from .ray_call import Call
from .ray_journal import Journal

log = logging.getLogger("fastblt.ingress")

MOST_LOSSES = 3
"""Replicas in a row that may be lost with a request without any progress: it may be what ends them."""
RETRY_SECONDS = 0.25
LATER_SECONDS = 1.0
"""A replica that has the call sends a silent stream its empty lines. So much later they come from here: it hangs, or
its machine is gone."""
DONE = format_sse_event(data_str="[DONE]")

Ask = Callable[[Call], AsyncGenerator[str | list[Message], None]]
"""Sends a call to a replica: gives its id, then the messages of its answer. Raises ReplicaLost, ReplicaFailed,
NoRoom."""
Unavailable = Callable[[str, Code], ApiError]


class ReplicaLost(Exception):
    """The replica has ended, or cannot be reached."""


class NoRoom(Exception):
    """No replica takes the request now."""


class ReplicaFailed(Exception):
    """The replica's application raised an exception, its cause."""


class BrokenOff(Exception):
    """An answer that has begun and is no stream cannot be completed."""


@dataclass(frozen=True)
class Refusal:
    """A replica's answer to a completion: an error, in two messages."""

    start: Message
    body: Message

    @property
    def is_for_now(self) -> bool:
        """Whether it says nothing of the request, only of the replica."""
        return bool(self.start["status"] == 503 or self._error["code"] == "queue_full")

    @property
    def is_of_another_model(self) -> bool:
        return bool(self._error["code"] == "replica_lost")

    @property
    def retry_after(self) -> float:
        return float(dict(map(tuple, self.start["headers"])).get(b"retry-after", b"inf"))

    def error(self) -> ApiError:
        error = self._error
        return ApiError(self.start["status"], error["message"], code=error["code"], param=error["param"])

    @property
    def _error(self) -> dict[str, Any]:
        error: dict[str, Any] = orjson.loads(self.body["body"])["error"]
        return error


class Relay:
    """The answer to one request."""

    def __init__(self, ask: Ask, send: Send, *, wait: float, keepalive: float, unavailable: Unavailable) -> None:
        """wait: seconds for a replica to take the request, also after a loss. keepalive: after so many seconds of
        silence, a stream gets an empty line."""
        self._ask = ask
        self._send = send
        self._wait = wait
        self._keepalive = keepalive
        self._unavailable = unavailable
        self._journal = Journal()
        self._clock = asyncio.get_running_loop().time
        self._arrived = self._clock()
        self._first_byte: float | None = None
        self._began: Message | None = None
        """The message that started the client's response."""
        self._has_body = False
        """Whether some of it was sent."""
        self._is_in_event = False
        """Whether a part of an event was sent, and not yet its end."""
        self._is_done = False
        """Whether the last event of a stream was sent."""
        self._is_whole = False
        self._error: Message | None = None
        """The start of a replica's answer, if that is an error."""
        self._refusal: Refusal | None = None
        """Of the replicas that have no room for now, the one that may have it first."""
        self._has_told = False
        """Whether the replica has told anything new."""
        self._replica: str | None = None
        self._model = ""
        """Fingerprint of the model that told what came so far."""

    async def run(self, call: Call) -> None:
        """Raises ApiError if nothing was sent yet, BrokenOff."""
        try:
            await self._run(call)
        except ApiError as error:
            if not self._began:
                raise
            if not self._is_stream:
                raise BrokenOff(error.body["error"]["message"]) from error
            await self._send_body(format_sse_event(data_str=to_json(error.body).decode()) + DONE, more=False)

    @property
    def has_begun(self) -> bool:
        return self._began is not None

    async def _run(self, call: Call) -> None:
        """Until a replica's answer is complete."""
        deadline, losses, why = self._arrived + self._wait, 0, "the replica is gone"
        while True:
            try:
                return await self._from_a_replica(call, deadline)
            except ReplicaLost as error:
                if self._is_whole:
                    return
                if self._replica:
                    log.warning("the replica %s was lost: %s", self._replica, error)
                    losses = 1 if self._has_told else losses + 1
                    deadline = self._clock() + self._wait
                    why = "the replica that ran this request is gone"
                else:
                    # It was gone before, which says nothing of the request.
                    await asyncio.sleep(RETRY_SECONDS)
            except NoRoom:
                if not losses and (not self._replica or self._clock() >= deadline):
                    if self._refusal:
                        return await self._pass_refusal_on(self._refusal)
                    raise self._unavailable("no replica has room for this request", "no_replica") from None
                if losses:
                    await asyncio.sleep(RETRY_SECONDS)
            if self._is_done:
                return await self._send_body(b"", more=False)
            if call.replica or (self._began and not (call.origin and self._can_go_on)):
                raise self._lost(why)
            if losses > MOST_LOSSES:
                raise self._lost(f"{losses} replicas in a row were lost while they ran this request")
            if losses and self._clock() >= deadline:
                raise self._lost(f"{why}, and no other took it within {self._wait:g} s")
            call = call.again(call.origin and self._so_far(call.origin, losses > 0), self._replica)

    def _so_far(self, origin: Origin, is_continued: bool) -> Origin:
        return replace(
            origin,
            attempt=origin.attempt + 1,
            is_continued=is_continued,
            age=self._clock() - self._arrived,
            first_byte_seconds=self._first_byte and round(self._first_byte - self._arrived, 6),
            shown=self._journal.shown(),
            held=self._journal.held(),
            model=self._model,
        )

    def _lost(self, why: str) -> ApiError:
        return self._unavailable(f"{why}; send it again", "replica_lost")

    @property
    def _is_stream(self) -> bool:
        headers = map(tuple, self._began["headers"]) if self._began else ()
        return (b"content-type", b"text/event-stream; charset=utf-8") in headers

    @property
    def _can_go_on(self) -> bool:
        """Whether another replica's answer fits to what was sent. A JSON answer counts the work of its replica, so a
        part of one does not fit to a part of another."""
        return self._is_stream or not self._has_body

    async def _from_a_replica(self, call: Call, deadline: float) -> None:
        """The whole answer, or what is left of it. Raises ReplicaLost, NoRoom, ApiError."""
        self._replica, self._has_told, self._error = None, False, None
        async with aclosing(self._ask(call)) as items:
            first = await self._next(items, self._keepalive, deadline)
            assert isinstance(first, str)
            self._replica = first
            while (messages := await self._next(items, self._keepalive + LATER_SECONDS)) is not None:
                assert isinstance(messages, list)
                for message in messages:
                    await self._pass_on(message, call)
        if call.replica and not self._began:
            raise ApiError(404, f"there is no replica {call.replica}", code="unknown_url")
        if not self._is_whole:
            raise ReplicaLost("its engine is gone")

    async def _next(
        self, items: AsyncGenerator[str | list[Message], None], keepalive: float, deadline: float = math.inf
    ) -> str | list[Message] | None:
        """None after the last. Raises NoRoom if it does not come by the deadline."""
        item = asyncio.ensure_future(anext(items, None))
        try:
            while not item.done():
                left = deadline - self._clock()
                if left <= 0:
                    raise NoRoom
                await asyncio.wait({item}, timeout=min(left, keepalive))
                if not item.done() and self._is_stream and not self._is_in_event:
                    await self._send_body(KEEPALIVE)
            return item.result()
        finally:
            if not item.done():
                item.cancel()
                await asyncio.wait({item})

    async def _pass_on(self, message: Message, call: Call) -> None:
        if told := message.pop(TOLD, None):
            self._has_told, self._model = True, message.pop(MODEL)
            self._journal.hold(told)
        if message["type"] == ONLY_TOLD:
            return
        if message["type"] == "http.response.start":
            return await self._start(message, call)
        if self._error:
            return await self._refused(Refusal(self._error, message), call)
        await self._send_body(message.get("body", b""), more=message.get("more_body", False))
        self._journal.show()
        if self._first_byte is None and self._journal.has_shown_bytes:
            self._first_byte = self._clock()

    async def _start(self, message: Message, call: Call) -> None:
        """Begins the response, unless it has begun or another replica may have a better one."""
        began, status = self._began, message["status"]
        if began and status == began["status"]:
            return
        if began or call.origin and status in (429, 503):
            self._error = message
            return
        await self._begin(message)

    async def _begin(self, start: Message) -> None:
        self._began = start
        # Ray's proxy adds its own.
        start["headers"] = [pair for pair in start["headers"] if pair[0] != b"x-request-id"]
        await self._send(start)

    async def _refused(self, refusal: "Refusal", call: Call) -> None:
        """Raises NoRoom if another replica may take it: one is asked after the other until all have refused, or enough
        of them."""
        is_new = call.is_new_to(self._replica)
        if refusal.is_for_now:
            self._refusal = min(refusal, self._refusal or refusal, key=lambda one: one.retry_after)
            if is_new or call.origin and call.origin.is_continued and not refusal.is_of_another_model:
                raise NoRoom
        if self._began:
            raise refusal.error()
        await self._pass_refusal_on(self._refusal if refusal.is_for_now and self._refusal else refusal)

    async def _pass_refusal_on(self, refusal: "Refusal") -> None:
        self._error = None
        await self._begin(refusal.start)
        await self._send_body(refusal.body["body"], more=False)

    async def _send_body(self, body: bytes, *, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more})
        self._has_body |= bool(body)
        self._is_in_event = not body.endswith(b"\n\n") if body else self._is_in_event
        self._is_done |= body.endswith(DONE)
        self._is_whole |= not more
