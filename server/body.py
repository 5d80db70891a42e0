"""A request's body: of the right type, and within bounds."""

from fastapi import Request
from starlette.requests import ClientDisconnect

from .body_room import HeldBody
from .errors import ApiError, shown
from .settings import ServerSettings

UTF_8 = ("", "charset=utf-8", 'charset="utf-8"')
DISCARD_FACTOR = 4
"""A body of up to this many times the limit is read to its end and thrown away before it is refused: a client that is
still sending would see its connection reset instead of the answer."""


def check_content(request: Request) -> None:
    """Raises ApiError 415 unless the headers declare plain JSON.

    A page of any origin can make a browser send text, forms and untyped bodies without a preflight; JSON needs one. So
    this check keeps web pages from using a server that their visitor can reach.
    """
    media_type, _, parameters = request.headers.get("content-type", "").partition(";")
    media_type, charset = media_type.strip().lower(), parameters.strip().lower()
    if media_type != "application/json" or charset not in UTF_8:
        given = request.headers.get("content-type")
        message = (
            f"send the body with 'Content-Type: application/json', not {shown(given) if given else 'without a type'}"
        )
        raise ApiError(415, message, code="unsupported_media_type")
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        message = f"send the body uncompressed, not with 'Content-Encoding: {shown(coding)[1:-1]}'"
        raise ApiError(415, message, code="unsupported_media_type", headers={"accept-encoding": "identity"})


async def read_body(request: Request, settings: ServerSettings, held: HeldBody) -> bytes:
    """Raises ApiError 413 for too many bytes, however they are sent, 408 for a client that takes too long, and 429 if
    there is no room for the body, or it has to give way."""
    limit = settings.max_body_bytes
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit * DISCARD_FACTOR:
        raise _too_large(limit, announced)
    body = bytearray()
    size = 0
    try:
        async with held.arrival:
            async for part in request.stream():
                size += len(part)
                if size > limit * DISCARD_FACTOR:
                    raise _too_large(limit, f"{size} or more")
                if size <= limit:
                    held.take(len(part))
                    body += part
            held.arrived()
    except TimeoutError:
        raise held.no_room() from None
    except ClientDisconnect:
        raise ClientLeft from None
    if size > limit:
        raise _too_large(limit, f"{size}")
    return bytes(body)


def _too_large(limit: int, size: str) -> ApiError:
    message = f"the body must have at most {limit} bytes, not {size}"
    return ApiError(413, message, code="body_too_large", headers={"connection": "close"})


class ClientLeft(Exception):
    """The client has disconnected."""
