"""JSON bodies."""

import asyncio
import time
from collections.abc import Iterator
from functools import cache
from io import BytesIO
from typing import Any

import orjson
from pydantic import BaseModel, TypeAdapter
from starlette.responses import Response

ENTRIES = 32
"""Most entries of a list that are encoded at once; each may hold hundreds of log-probabilities."""
TURN_SECONDS = 0.002
"""After so long the event loop's other work has its turn."""


def to_json(content: Any) -> bytes:
    """Encodes a pydantic model or any JSON value. NaN and infinities become null."""
    return content.model_dump_json().encode() if isinstance(content, BaseModel) else orjson.dumps(content)


async def to_json_in_turns(content: BaseModel) -> bytes:
    """The same, but megabytes do not block the event loop. They would from a thread, too: the encoder keeps the
    interpreter's lock."""
    if not _is_long(content):
        return to_json(content)
    # A join would copy all at once.
    written, began = BytesIO(), time.perf_counter()
    for part in _parts(content):
        written.write(part)
        if time.perf_counter() - began > TURN_SECONDS:
            await asyncio.sleep(0)
            began = time.perf_counter()
    return written.getvalue()


def _is_long(value: Any) -> bool:
    """Whether a list is in it that has more than `ENTRIES`."""
    if isinstance(value, BaseModel):
        return any(map(_is_long, value.__dict__.values()))
    if not isinstance(value, list) or not value:
        return False
    return len(value) > ENTRIES or (isinstance(value[0], BaseModel) and any(map(_is_long, value)))


def _parts(content: BaseModel) -> Iterator[bytes]:
    long = {name: value for name, value in content.__dict__.items() if _is_long(value)}
    frame = content.model_copy(update=dict.fromkeys(long, []))
    rest = frame.model_dump_json(warnings=False).encode()
    for name, value in long.items():
        # No text has this, as its quotes are escaped.
        before, _, rest = rest.partition(b'"%b":[]' % name.encode())
        yield before + b'"%b":' % name.encode()
        if isinstance(value, BaseModel):
            yield from _parts(value)
        else:
            yield from _parts_of_list(value, _adapter(type(content), name))
    yield rest


def _parts_of_list(values: list[Any], adapter: TypeAdapter[Any]) -> Iterator[bytes]:
    comma = b"["
    for start in range(0, len(values), ENTRIES):
        some = values[start : start + ENTRIES]
        if not _is_long(some):
            yield comma + adapter.dump_json(some)[1:-1]
            comma = b","
            continue
        for value in some:
            yield comma
            yield from _parts(value)
            comma = b","
    yield b"]"


@cache
def _adapter(model: type[BaseModel], field: str) -> TypeAdapter[Any]:
    annotation: Any = model.model_fields[field].annotation
    return TypeAdapter(annotation)


class JsonResponse(Response):
    """A response of `to_json`."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return content if isinstance(content, bytes) else to_json(content)
