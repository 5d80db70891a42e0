"""A client that leaves takes its work with it."""

import asyncio
import json
import socket
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import httpx
import pytest

from tests.serving import RunningServer

FREE_SECONDS = 10
HEAD = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + FREE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_no_page_is_in_use_after_200_requests_of_which_half_disconnect(server: RunningServer) -> None:
    async def one(http: httpx.AsyncClient, number: int) -> bool:
        leaves = number % 2 == 0
        asked = {"model": "tiny", "prompt": f"request {number}", "max_tokens": 3000 if leaves else 10, "stream": True}
        async with http.stream("POST", "/v1/completions", json=asked | {"ignore_eos": True, "n": 1}) as response:
            assert response.status_code == 200
            lines = 0
            async for line in response.aiter_lines():
                lines += line.startswith("data: ")
                if leaves and lines == 2 + number % 5:
                    return False
                if line == "data: [DONE]":
                    return True
        raise AssertionError("a stream ended without [DONE]")

    async def everyone() -> list[bool]:
        limits = httpx.Limits(max_connections=40)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:
            return await asyncio.gather(*(one(http, number) for number in range(200)))

    before = server.aborted()
    done = asyncio.run(everyone())
    assert done == [number % 2 == 1 for number in range(200)]
    until(lambda: server.pages_in_use() == 0)
    assert server.metrics("fastblt_running_sequences") == {"fastblt_running_sequences": 0}
    assert server.metrics("fastblt_queued_sequences") == {"fastblt_queued_sequences": 0}
    assert server.aborted() - before == 100


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_disconnects_frees_its_pages_at_once(server: RunningServer, stream: bool) -> None:
    # Many sequences: two may end before the client has looked and left.
    body = json.dumps(
        {"model": "tiny", "prompt": "a", "max_tokens": 4000, "ignore_eos": True, "stream": stream, "n": 16}
    )
    address = urlsplit(server.url)
    until(lambda: server.pages_in_use() == 0)
    before = server.aborted()
    head = f"{HEAD}content-length: {len(body)}\r\n\r\n"
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall((head + body).encode())
        until(lambda: server.metrics("fastblt_running_sequences") == {"fastblt_running_sequences": 16})
        assert server.pages_in_use() > 0
    left = time.monotonic()
    until(lambda: server.pages_in_use() == 0)
    # Far less than 4000 bytes take.
    assert time.monotonic() - left < 2
    assert server.aborted() - before == 16


def test_a_request_body_that_breaks_off_is_logged_as_499(server: RunningServer) -> None:
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(f"{HEAD}content-length: 100\r\n\r\n{{".encode())
    until(lambda: 'route="/v1/completions",status="499"' in str(server.metrics("fastblt_http_responses_total")))
    assert "Traceback" not in server.log.read_text()
