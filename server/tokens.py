"""`POST /tokenize` and `POST /detokenize`, which spare programs a tokenizer of their own."""

from collections.abc import Callable
from typing import TypeVar

from fastapi import Request
from starlette.responses import Response

from engine import admission
from engine.config import BOS_ID, ModelLimits

from . import tokenizer
from .body import check_content, read_body
from .errors import ApiError, from_failed
from .generation import Service
from .model_names import check_model
from .parsing import off_the_loop, parse_detokenize, parse_tokenize
from .responses import JsonResponse, to_json_in_turns
from .settings import ServerSettings
from .token_names import token_name
from .token_schemas import Detokenized, Tokenized

T = TypeVar("T")


async def tokenize(request: Request, service: Service) -> Response:
    """Raises ApiError."""
    return JsonResponse(await to_json_in_turns(await _answered(request, service, _tokenized)))


async def detokenize(request: Request, service: Service) -> Response:
    """Raises ApiError."""
    return JsonResponse(await to_json_in_turns(await _answered(request, service, _detokenized)))


async def _answered(request: Request, service: Service, answer: Callable[[bytes, ServerSettings, ModelLimits], T]) -> T:
    check_content(request)
    settings, limits = service.settings, service.client.limits
    with service.gate.bodies.enter() as held:
        body = await read_body(request, settings, held)
        return await off_the_loop(body, lambda: answer(body, settings, limits))


def _tokenized(body: bytes, settings: ServerSettings, limits: ModelLimits) -> Tokenized:
    asked = parse_tokenize(body)
    _check_model(asked.model, settings, limits)
    _check_length("prompt", len(asked.prompt.encode()), settings)
    ids = [BOS_ID] * asked.add_special_tokens + tokenizer.ids_of(asked.prompt)
    return Tokenized(
        count=len(ids),
        max_model_len=limits.max_length,
        tokens=ids,
        token_strs=[token_name(token) for token in ids] if asked.return_token_strs else None,
    )


def _detokenized(body: bytes, settings: ServerSettings, limits: ModelLimits) -> Detokenized:
    asked = parse_detokenize(body)
    _check_model(asked.model, settings, limits)
    _check_length("tokens", len(asked.tokens), settings)
    if fault := admission.unknown_id("tokens", asked.tokens, limits):
        raise from_failed(fault)
    return Detokenized(prompt=tokenizer.text_of(asked.tokens))


def _check_model(name: str | None, settings: ServerSettings, limits: ModelLimits) -> None:
    if name is not None:
        check_model(name, settings, limits)


def _check_length(field: str, length: int, settings: ServerSettings) -> None:
    """A text may be longer than a sequence, but an answer is not."""
    if length > settings.max_scores:
        message = f"{field}: must have at most {settings.max_scores} ids, not {length}"
        raise ApiError(400, message, param=field, code="too_many_scores")
