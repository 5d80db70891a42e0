"""Reading a request body within bounds."""

import asyncio

from fastapi import Request
from starlette.requests import ClientDisconnect

from .errors import ApiError
from .settings import ServerSettings

DISCARD_FACTOR = 4
"""A body of up to this many times the limit is read to its end and thrown away before it is refused: a client that is
still sending would see its connection reset instead of the answer."""


async def read_body(request: Request, settings: ServerSettings) -> bytes:
    """Raises ApiError 413 for too many bytes, however they are sent, and 408 for a client that takes too long."""
    limit = settings.max_body_bytes
    message = f"the body must have at most {limit} bytes"
    too_large = ApiError(413, message, code="body_too_large", headers={"connection": "close"})
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit * DISCARD_FACTOR:
        raise too_large
    body = bytearray()
    size = 0
    try:
        async with asyncio.timeout(settings.body_timeout):
            async for part in request.stream():
                size += len(part)
                if size > limit * DISCARD_FACTOR:
                    raise too_large
                if size <= limit:
                    body += part
    except TimeoutError:
        message = f"the body did not arrive within {settings.body_timeout:g} s"
        raise ApiError(408, message, code="body_timeout", headers={"connection": "close"}) from None
    except ClientDisconnect:
        raise ClientLeft from None
    if size > limit:
        raise too_large
    return bytes(body)


class ClientLeft(Exception):
    """There is nobody to answer."""
