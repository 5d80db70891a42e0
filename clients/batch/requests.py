"""The input of a batch: one request a line, as OpenAI's batch files have them."""

import json
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from .index import Index

METHOD, PATH = "POST", "/v1/completions"
FIELDS = ("custom_id", "method", "url", "body")
LONGEST_LINE = 16 << 20
"""Bytes. A server takes less, and a file without line ends would fill the memory."""


class LineError(Exception):
    """What is wrong with a line itself. Sending it again would not help."""

    def __init__(self, code: str, message: str, param: str | None = None, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param, self.custom_id = code, param, custom_id


class Request(NamedTuple):
    """line: its number in the input, from 1. body: of the request, as JSON."""

    line: int
    custom_id: str
    body: bytes


class Refused(NamedTuple):
    """A line that cannot be sent, and why."""

    line: int
    error: LineError


class Answered(NamedTuple):
    """A line whose answer an earlier run has written."""

    line: int


def pending(file: BinaryIO, index: Index) -> Iterator[Request | Refused | Answered]:
    """What to do about each line that is not blank, in the file's order."""
    for number, line in enumerate(_lines(file), 1):
        if line is not None and not line.strip():
            continue
        try:
            request = _parse(line, number)
            body = _checked(request, index)
        except LineError as error:
            yield Answered(number) if index.is_refused(number) else Refused(number, error)
            continue
        if index.is_answered(request.custom_id):
            yield Answered(number)
        else:
            yield Request(number, request.custom_id, body)


def count_lines(file: BinaryIO) -> int:
    """Lines that are not blank; the file is read from here to its end."""
    return sum(line is None or bool(line.strip()) for line in _lines(file))


class _Parsed(NamedTuple):
    line: int
    custom_id: str
    fields: dict[str, Any]


def _lines(file: BinaryIO) -> Iterator[bytes | None]:
    """None stands for a line that is too long."""
    while line := file.readline(LONGEST_LINE + 1):
        if len(line) <= LONGEST_LINE:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(LONGEST_LINE)
        yield None


def _parse(line: bytes | None, number: int) -> _Parsed:
    """Raises LineError if the line has no custom_id that its answer could have."""
    if line is None:
        raise LineError("line_too_long", f"line {number}: longer than {LONGEST_LINE:,} bytes")
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise LineError("invalid_json", f"line {number}: not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise LineError("invalid_json", f"line {number}: must be an object with {', '.join(FIELDS)}")
    custom_id = fields.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise LineError("invalid_value", f"line {number}: custom_id must be a non-empty string", "custom_id")
    try:
        custom_id.encode()
    except UnicodeEncodeError:
        raise LineError(
            "invalid_value", f"line {number}: custom_id has half of a surrogate pair", "custom_id"
        ) from None
    return _Parsed(number, custom_id, fields)


def _checked(parsed: _Parsed, index: Index) -> bytes:
    """The body. Raises LineError. A custom_id belongs to the first line that has it, even if that line is wrong."""
    line, custom_id, fields = parsed

    def refuse(param: str, message: str, code: str = "invalid_value") -> LineError:
        return LineError(code, f"line {line}: {message}", param, custom_id)

    if (first := index.first_use(custom_id, line)) != line:
        raise refuse("custom_id", f"custom_id {_shown(custom_id)} is already on line {first}", "duplicate_custom_id")
    if unknown := fields.keys() - set(FIELDS):
        name = min(unknown)
        raise refuse(name[:80], f"{_shown(name)} is not a field of a request: {', '.join(FIELDS)}")
    for name, right in (("method", METHOD), ("url", PATH)):
        if fields.get(name) != right:
            raise refuse(name, f"{name} must be {right!r}, not {_shown(fields.get(name))}", f"invalid_{name}")
    body = fields.get("body")
    if not isinstance(body, dict):
        raise refuse("body", f"body must be an object, not {_shown(body)}")
    if body.get("stream"):
        raise refuse("body.stream", "body.stream must be false or missing: a batch does not stream")
    try:
        return json.dumps(body, allow_nan=False).encode()
    except ValueError:
        raise refuse("body", "body has NaN or an infinite number, which JSON does not have") from None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
