"""The replica's half of an answer: runs the application for one call, and gives its messages in batches."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import replace

import msgspec
from fastapi import FastAPI
from starlette.types import Message, Scope

from engine.types import Event
from server.access_log import Access

from .ray_call import Call

GATHER_SECONDS = 0.01
"""Output sooner than this after the last is sent with what follows: a message costs three processes the same, whatever
its size."""
TELL_SECONDS = 1.0
"""Between two messages that only tell of events, of an answer that has no other yet."""
TOLD = "told"
"""Where a message has the events that it is made of, and those before them that it shows nothing of."""
MODEL = "model"
"""Where such a message has the fingerprint of the model that told them."""
ONLY_TOLD = "fastblt.told"
"""Type of a message that has nothing else."""

encode = msgspec.msgpack.Encoder().encode


async def answer(app: FastAPI, call: Call, replica: str) -> AsyncGenerator[list[Message], None]:
    """The application's messages, as they come. Closed early, the application sees its client leave. If its engine is
    gone in the middle of a completion, they end without the last one, or without any. replica: the id of this one."""
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    bodies = [{"type": "http.request", "body": call.body, "more_body": False}]
    left = asyncio.Event()
    told: list[tuple[int, bytes]] = []
    scope = dict(call.scope)

    def note(index: int, event: Event) -> None:
        told.append((index, encode(event)))

    if call.origin:
        passes_on = call.is_new_to(replica) or call.origin.is_continued
        scope["state"] = {"origin": replace(call.origin, note=note, passes_on=passes_on)}

    async def receive() -> Message:
        if bodies:
            return bodies.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if call.origin and _has_lost_its_engine(scope, began):
            # Another replica may have one.
            return
        if told and message["type"] == "http.response.body":
            add_told(message)
        messages.put_nowait(message)

    def add_told(message: Message) -> None:
        message[TOLD], message[MODEL] = told.copy(), app.state.service.client.limits.fingerprint
        told.clear()

    async def tell() -> None:
        while True:
            await asyncio.sleep(TELL_SECONDS)
            # While a stream runs, its next chunk is soon.
            if told and not began:
                message: Message = {"type": ONLY_TOLD}
                add_told(message)
                messages.put_nowait(message)

    async def run() -> None:
        try:
            await app(scope, receive, send)
        finally:
            messages.put_nowait(None)

    running, telling = asyncio.create_task(run()), asyncio.create_task(tell())
    began = False
    yielded = 0.0
    try:
        while (message := await messages.get()) is not None:
            batch = [message]
            await asyncio.sleep(yielded + GATHER_SECONDS - time.monotonic())
            with suppress(asyncio.QueueEmpty):
                while message := messages.get_nowait():
                    batch.append(message)
            yielded, began = time.monotonic(), began or batch[-1]["type"] != ONLY_TOLD
            yield batch
            if message is None:
                break
        await running
    finally:
        left.set()
        telling.cancel()
        await asyncio.wait({running, telling})


def _has_lost_its_engine(scope: Scope, began: bool) -> bool:
    """With a request that it had admitted: to a new one it only has an error to say. began: the answer."""
    access: Access = scope["state"]["access"]
    is_admitted = began or access.generation is not None
    return is_admitted and access.error is not None and access.error.code == "engine_dead"
