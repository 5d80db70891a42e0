"""One error body for every failure, as OpenAI's clients expect it."""

import re
import reprlib
from collections.abc import Collection
from typing import Any, Literal

from fastapi import FastAPI, Request
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from engine.admission import Fault
from engine.types import Failed

from .nearest import nearest
from .responses import JsonResponse

SHOWN_CHARACTERS = 80
"""Characters of an offending value that a message repeats."""
Code = Literal[
    "body_too_large",
    "context_length_exceeded",
    "decoder_unavailable",
    "draining",
    "ended_by_operator",
    "engine_dead",
    "engine_restarting",
    "headers_too_large",
    "internal_error",
    "invalid_api_key",
    "invalid_http",
    "invalid_json",
    "invalid_value",
    "method_not_allowed",
    "missing_required_parameter",
    "model_not_found",
    "no_replica",
    "queue_full",
    "rate_limit_exceeded",
    "replica_lost",
    "request_not_found",
    "request_timeout",
    "too_many_connections",
    "too_many_queued_bytes",
    "too_many_requests",
    "too_many_scores",
    "unknown_parameter",
    "unknown_url",
    "unsupported_media_type",
    "unsupported_parameter",
]
"""Lets programs distinguish errors. Errors about fields that do not go together have none."""
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable",
}

REFUSALS: dict[str, Code] = {
    "too_long": "context_length_exceeded",
    "decoder_unavailable": "decoder_unavailable",
    "invalid": "invalid_value",
}
"""The engine's codes, and ours for them."""
NO_CHAT = ": the models are base models without a chat template; send the text to continue to POST /v1/completions"
"""For clients that chat."""
NO_MESSAGES = "; chat is not offered: send prompt"
"""The same for the field that they send."""
PLAINER = {
    "Value error, ": "",
    "Input should be False": "must be false",
    "Input should be ": "must be ",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
}
"""Words of Pydantic's messages, and ours for them, which `engine.admission` uses too."""


class ShowsValue(ValueError):
    """Of a validator whose message says itself what was given."""


class ErrorDetail(BaseModel):
    """What went wrong, and in which field."""

    message: str
    type: str
    param: str | None = None
    code: Code | None = None


class ErrorBody(BaseModel):
    """The body of every response with status 400 or above."""

    error: ErrorDetail


class ApiError(Exception):
    """Becomes the response with this status, or an error event in a stream that has begun."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: Code | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.headers = headers or {}
        kind = TYPES.get(status, "invalid_request_error")
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JsonResponse:
        return JsonResponse(self.body, self.status, self.headers)


def internal_error(request_id: str, why: str = "internal error") -> ApiError:
    """`why` hides the cause, which is logged under the same id."""
    return ApiError(500, f"{why}; it is logged under request id {request_id}", code="internal_error")


def request_timeout(seconds: float) -> ApiError:
    """For a request that did not arrive in time."""
    message = f"the request did not arrive within {seconds:g} s"
    return ApiError(408, message, code="request_timeout", headers={"connection": "close"})


def from_failed(failed: Failed | Fault, prompt: int | None = None) -> ApiError:
    """For a request that `engine.admission` refuses. prompt: which of several it has."""
    assert failed.code != "internal"
    message = failed.message
    if prompt is not None:
        message = re.sub(r"^prompt\b|\ba prompt\b", f"prompt[{prompt}]", message)
    return ApiError(400, message, param=failed.param, code=REFUSALS[failed.code])


def from_validation(error: ValidationError, known: Collection[str]) -> ApiError:
    """Names the first offending field, its value and what would be right. known: the body's fields."""
    first = error.errors(include_url=False, include_context=True)[0]
    kind, path = first["type"], [str(part) for part in first["loc"]]
    field = ".".join(path)[:SHOWN_CHARACTERS] or None
    if kind == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']}", code="invalid_json")
    if field is None:
        return ApiError(400, f"the body must be a JSON object, not {shown(first['input'])}", code="invalid_value")
    if kind == "missing":
        return ApiError(400, f"{field} is required", param=field, code="missing_required_parameter")
    if kind == "extra_forbidden":
        return unknown_parameter(field, known if len(path) == 1 else ())
    message = first["msg"]
    for theirs, ours in PLAINER.items():
        message = message.replace(theirs, ours, 1)
    message = f"{field}: {message[:1].lower()}{message[1:]}"
    if not isinstance(first.get("ctx", {}).get("error"), ShowsValue):
        message += f", not {shown(first['input'])}"
    return ApiError(400, message, param=field, code="invalid_value")


def unknown_parameter(field: str, known: Collection[str]) -> ApiError:
    """known: fields that may be meant."""
    field = field[:SHOWN_CHARACTERS]
    hint = NO_MESSAGES if field == "messages" else ""
    if not hint and (meant := nearest(field, known)):
        hint = f"; did you mean {meant}?"
    return ApiError(400, f"{field} is not a known parameter{hint}", param=field, code="unknown_parameter")


def shown(value: object) -> str:
    """An offending value, shortened for a message; the rest is not formatted at all. As JSON has it, but for the quotes
    of strings."""
    text = _SHORT.repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


class _Json(reprlib.Repr):
    def repr_bool(self, value: bool, level: int) -> str:
        return str(value).lower()

    def repr_NoneType(self, value: None, level: int) -> str:
        return "null"


_SHORT = _Json()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = SHOWN_CHARACTERS


async def _on_api_error(request: Request, error: Exception) -> JsonResponse:
    assert isinstance(error, ApiError)
    request.state.access.error = error
    return error.response()


async def _on_http_exception(request: Request, error: Exception) -> JsonResponse:
    assert isinstance(error, HTTPException)
    return await _on_api_error(request, _from_http(request, error))


def _from_http(request: Request, error: HTTPException) -> ApiError:
    path = shown(request.url.path)[1:-1]
    where = f"{request.method} {path}"
    headers = dict(error.headers or {})
    match error.status_code:
        case 404:
            why = ""
            if request.url.path.rstrip("/").endswith("/chat/completions"):
                why = NO_CHAT
            elif _is_route(request, f"/v1{request.url.path}"):
                why = f"; did you mean /v1{path}? An OpenAI client's base_url ends in /v1"
            return ApiError(404, f"there is no route {where}{why}", code="unknown_url", headers=headers)
        case 405:
            message = f"{where} is not offered; allowed: {headers.get('allow') or headers.get('Allow')}"
            return ApiError(405, message, code="method_not_allowed", headers=headers)
    return ApiError(error.status_code, str(error.detail), headers=headers)


def _is_route(request: Request, path: str) -> bool:
    """Whether the request would have one at this path."""
    scope = {**request.scope, "path": path}
    return any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)


def add_error_handlers(app: FastAPI) -> None:
    """Leaves all other exceptions to `server.middleware`, which knows the request's id."""
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
