"""HTTP/1.1 by hand: exactly these bytes over a socket, and what comes back as h11 reads it."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import h11

SECONDS = 10


class Answer:
    """A response, whole."""

    def __init__(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        self.headers = {name.decode(): value.decode() for name, value in headers}
        self.body = b""

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """Of an error."""
        return str(self.json()["error"]["code"])


class Raw:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answers(self, *methods: bytes) -> list[Answer]:
        """The answers to requests with these methods, in order. Fails if one does not come whole."""
        found: list[Answer] = []
        client = h11.Connection(h11.CLIENT)
        for method in methods:
            client.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
            client.send(h11.EndOfMessage())
            while (event := await self._event(client)) is not h11.PAUSED and not isinstance(event, h11.EndOfMessage):
                if isinstance(event, h11.Response):
                    found.append(Answer(event.status_code, list(event.headers)))
                elif isinstance(event, h11.Data):
                    found[-1].body += bytes(event.data)
                else:
                    assert isinstance(event, h11.InformationalResponse), event
            if client.our_state is h11.DONE and client.their_state is h11.DONE:
                client.start_next_cycle()
        return found

    async def answer(self, method: bytes = b"GET") -> Answer:
        (answer,) = await self.answers(method)
        return answer

    async def rest(self) -> bytes:
        """All that comes until the server closes."""
        async with asyncio.timeout(SECONDS):
            return await self.reader.read()

    async def is_closed(self) -> bool:
        """Whether the server closes, without a further byte."""
        try:
            return await self.rest() == b""
        except ConnectionResetError:
            return True

    async def _event(self, client: h11.Connection) -> Any:
        while (event := client.next_event()) is h11.NEED_DATA:
            async with asyncio.timeout(SECONDS):
                client.receive_data(await self.reader.read(65536))
        return event


@asynccontextmanager
async def connected(port: int, **options: Any) -> AsyncIterator[Raw]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, **options)
    try:
        yield Raw(reader, writer)
    finally:
        writer.close()


def post(body: Any, *headers: str, path: str = "/v1/completions", version: str = "1.1") -> bytes:
    """A completion request, as bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/{version}", "host: x", "content-type: application/json", *headers]
    return "\r\n".join([*lines, f"content-length: {len(data)}", "", ""]).encode() + data
