"""Parts of `/openapi.json` that FastAPI cannot derive: the bodies, which their routes read by themselves, and the
errors."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from .errors import ErrorBody
from .links import LINKS
from .schemas import CompletionRequest
from .token_schemas import DetokenizeRequest, TokenizeRequest

REF = "#/components/schemas/{model}"
BODIES: tuple[type[BaseModel], ...] = (CompletionRequest, TokenizeRequest, DetokenizeRequest)
EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
"""An event of a stream: its data is a Completion as JSON, an error's body, or [DONE]."""


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """The body of a route: one of `BODIES`."""
    content = {"application/json": {"schema": {"$ref": REF.format(model=model.__name__)}}}
    return {"requestBody": {"required": True, "content": content}}


def errors(*statuses: int, keys: bool = True) -> dict[int | str, dict[str, Any]]:
    """The error responses of a route, including those that every route has. keys: whether it needs an API key."""
    every = {*statuses, 431, 500, *([401] if keys else [])}
    return {status: {"model": ErrorBody} for status in sorted(every)}


BODY_ERRORS = errors(400, 404, 408, 413, 415, 429)
COMPLETION_ANSWERS = BODY_ERRORS | errors(403, 503) | {200: {"content": {"text/event-stream": {"schema": EVENT}}}}


class Application(FastAPI):
    """Puts the request's schemas among the components, where tools expect them, adds links, and drops the 422 that no
    route returns."""

    def openapi(self) -> dict[str, Any]:
        if not self.openapi_schema:
            schema = super().openapi()
            schemas = schema["components"]["schemas"]
            for model in BODIES:
                body = model.model_json_schema(ref_template=REF)
                schemas |= {model.__name__: body} | body.pop("$defs", {})
            for path, operations in schema["paths"].items():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
                    if path in LINKS:
                        operation["responses"]["200"]["links"] = LINKS[path]
            for unused in ("HTTPValidationError", "ValidationError"):
                schemas.pop(unused, None)
        assert self.openapi_schema
        return self.openapi_schema
