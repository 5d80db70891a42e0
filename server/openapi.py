"""Parts of `/openapi.json` that FastAPI cannot derive: the body of a completion, which its route reads by itself,
and the errors."""

from typing import Any

from fastapi import FastAPI

from .errors import ErrorBody
from .schemas import CompletionRequest

REF = "#/components/schemas/{model}"
COMPLETION_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": REF.format(model="CompletionRequest")}}},
    }
}
EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
"""An event of a stream: its data is a Completion as JSON, an error's body, or [DONE]."""


def errors(*statuses: int, keys: bool = True) -> dict[int | str, dict[str, Any]]:
    """The error responses of a route, including those that every route has. keys: whether it needs an API key."""
    every = {*statuses, 431, 500, *([401] if keys else [])}
    return {status: {"model": ErrorBody} for status in sorted(every)}


COMPLETION_ANSWERS = errors(400, 404, 408, 413, 415, 429, 503) | {
    200: {"content": {"text/event-stream": {"schema": EVENT}}}
}


class Application(FastAPI):
    """Puts the request's schemas among the components, where tools expect them, and drops the 422 that no route
    returns."""

    def openapi(self) -> dict[str, Any]:
        if not self.openapi_schema:
            schema = super().openapi()
            request = CompletionRequest.model_json_schema(ref_template=REF)
            schemas = schema["components"]["schemas"]
            schemas |= {"CompletionRequest": request} | request.pop("$defs")
            for operations in schema["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
            for unused in ("HTTPValidationError", "ValidationError"):
                schemas.pop(unused, None)
        assert self.openapi_schema
        return self.openapi_schema
