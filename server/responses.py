"""JSON bodies."""

from typing import Any

import orjson
from pydantic import BaseModel
from starlette.responses import Response


def to_json(content: Any) -> bytes:
    """Encodes a pydantic model or any JSON value. NaN and infinities become null."""
    return content.model_dump_json().encode() if isinstance(content, BaseModel) else orjson.dumps(content)


class JsonResponse(Response):
    """A response of `to_json`."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)
