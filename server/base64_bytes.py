"""Bytes in JSON, as `{"base64": "..."}`: those that are not UTF-8 are not the bytes of any string."""

import base64
import math
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

PATTERN = "^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"
RULE = "base64 must be of A-Z, a-z, 0-9, + and /, padded with = to a multiple of 4 characters"


class Base64Bytes(TypedDict):
    """Bytes that need not be UTF-8."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    base64: Annotated[str, Field(pattern=PATTERN, description="RFC 4648's standard alphabet, padded.")]


def is_base64(value: Any) -> bool:
    """Whether it has the form, not whether its text is valid."""
    return isinstance(value, dict) and value.keys() == {"base64"} and isinstance(value["base64"], str)


def from_base64(value: Base64Bytes) -> bytes:
    """Raises ValueError."""
    text = value["base64"]
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        raise ValueError(RULE) from None
    # Padding after whole groups is ignored by the library.
    if len(text) != 4 * math.ceil(len(data) / 3):
        raise ValueError(RULE)
    return data


def to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
