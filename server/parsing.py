"""A request's body as a `CompletionRequest` or another model, at a cost that the body's size bounds.

Validation builds an object, and perhaps an error, for every member, so a few megabytes of short members could take the
server a second and hundreds of megabytes. Hence members are first split off unread (msgspec's `Raw`), at memory speed,
and a body with too many is refused before validation.
"""

import asyncio
import contextvars
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

import msgspec
from pydantic import BaseModel, ValidationError

from engine.admission import prompt_too_long

from .errors import ApiError, from_failed, from_validation, shown, unknown_parameter
from .neutral import NEUTRAL
from .schemas import PROMPT_RULE, CompletionRequest
from .token_schemas import DetokenizeRequest, TokenizeRequest

OTHER_BYTES = 16 << 10
"""Most bytes of a body besides the values of known fields: names, white space, unknown fields that are null."""
FIELD_BYTES = 32 << 10
"""Most bytes of any field but these, and what else a body is sent for."""
LARGE_FIELDS = {"response_format": 256 << 10, "structured_outputs": 256 << 10}
"""Fields that hold a grammar of up to 100 kB, which JSON may write with more."""
SMALL_BODY_BYTES = 64 << 10
"""A larger one is parsed in a thread, so that the event loop is not blocked."""

T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)

_ABSENT = msgspec.Raw()
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.S)
_FIRST_ELEMENT = re.compile(rb'\[\s*(["\[{]?)')

_Base64Bytes = msgspec.defstruct("_Base64Bytes", [("base64", str)], forbid_unknown_fields=True)

_object = msgspec.json.Decoder(_Base64Bytes)
_arrays: dict[bytes, msgspec.json.Decoder[Any]] = {
    b"{": msgspec.json.Decoder(list[_Base64Bytes]),  # type: ignore[valid-type]
    b'"': msgspec.json.Decoder(list[str]),
    b"[": msgspec.json.Decoder(list[list[int]]),
    b"": msgspec.json.Decoder(list[int]),
}
"""By the first element's first character. Counting ends at the first element of another type."""

_worker = ThreadPoolExecutor(1, "parse")


async def off_the_loop(body: bytes, work: Callable[[], T]) -> T:
    """`work` on a large body in a thread, one such at a time; on a small one at once."""
    if len(body) <= SMALL_BODY_BYTES:
        return work()
    context = contextvars.copy_context()
    return await asyncio.get_running_loop().run_in_executor(_worker, context.run, work)


class Members:
    """Splits the members of a body off. large: the field without a limit."""

    def __init__(self, fields: list[str], large: str) -> None:
        members = [(name, msgspec.Raw, msgspec.field(default=_ABSENT)) for name in fields]
        self.fields, self._large = fields, large
        self._split = msgspec.json.Decoder(msgspec.defstruct("Members", members))
        self._split_strictly = msgspec.json.Decoder(msgspec.defstruct("Members", members, forbid_unknown_fields=True))

    def split(self, body: bytes) -> dict[str, msgspec.Raw]:
        """Empty for a small body that is not valid: its validation gives a better message. Raises ApiError."""
        try:
            members = self._split.decode(body)
        except (msgspec.DecodeError, RecursionError) as error:
            if len(body) <= SMALL_BODY_BYTES:
                return {}
            if isinstance(error, msgspec.ValidationError):
                begin = shown(body.lstrip()[:1].decode())
                message = f"the body must be a JSON object, and begin with '{{', not {begin}"
                raise ApiError(400, message, code="invalid_value") from None
            why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
            message = f"the body is not valid JSON: {why}"
            raise _encoding_fault(body) or ApiError(400, message, code="invalid_json") from None
        raws = {name: raw for name in self.fields if (raw := getattr(members, name)) is not _ABSENT}
        if len(body) - sum(map(len, raws.values())) > OTHER_BYTES:
            raise self._unknown_field(body)
        for name, raw in raws.items():
            most = LARGE_FIELDS.get(name, FIELD_BYTES)
            if name != self._large and len(raw) > most:
                message = f"{name}: must have at most {most} bytes, not {len(raw)}"
                raise ApiError(400, message, param=name, code="invalid_value")
        return raws

    def _unknown_field(self, body: bytes) -> ApiError:
        """For a body with too much besides its known fields: names the first unknown field, if any."""
        try:
            self._split_strictly.decode(body)
        except msgspec.ValidationError as error:
            if found := _UNKNOWN.fullmatch(str(error)):
                return unknown_parameter(found[1], self.fields)
        message = f"the body has more than {OTHER_BYTES} bytes of white space or of repeated fields"
        return ApiError(400, message, code="invalid_value")


COMPLETION = Members([*CompletionRequest.model_fields, *NEUTRAL], "prompt")
TOKENIZE = Members([*TokenizeRequest.model_fields], "prompt")
DETOKENIZE = Members([*DetokenizeRequest.model_fields], "tokens")


def parse(body: bytes, max_prompts: int, max_length: int) -> CompletionRequest:
    """max_prompts: most prompts of a request; max_length: most ids of a sequence. Raises ApiError 400."""
    raws = COMPLETION.split(body)
    if "prompt" in raws:
        # Of a prompt that is truncated only the rest must fit.
        most_ids = None if "truncate_prompt_tokens" in raws else max_length
        bound_prompt(bytes(raws["prompt"]), max_prompts, most_ids)
    _refuse_repeated_bias(raws.get("logit_bias"))
    return _validated(CompletionRequest, body)


def parse_tokenize(body: bytes) -> TokenizeRequest:
    """Raises ApiError 400."""
    TOKENIZE.split(body)
    return _validated(TokenizeRequest, body)


def parse_detokenize(body: bytes) -> DetokenizeRequest:
    """Raises ApiError 400."""
    DETOKENIZE.split(body)
    return _validated(DetokenizeRequest, body)


def _validated(model: type[Model], body: bytes) -> Model:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _encoding_fault(body) or from_validation(error, model.model_fields) from None


def bound_prompt(raw: bytes, max_prompts: int, max_length: int | None) -> None:
    """Counts an array's elements by characters that each must contain; never overcounts. Raises ApiError."""
    if raw[:1] == b"{":
        return _check_kind(raw, _object)
    first = _FIRST_ELEMENT.match(raw)
    if not first:
        return
    kind = first[1]
    if kind:
        # Only a string's last quote may follow a backslash without being one of its characters.
        quotes = raw.count(b'"') - raw.count(b'\\"')
        least = {b'"': quotes // 2, b"[": raw.count(b"[") - 1, b"{": raw.count(b"{")}[kind]
        if least > max_prompts:
            message = f"prompt: must have at most {max_prompts} prompts, not {least} or more"
            raise ApiError(400, message, param="prompt", code="invalid_value")
    elif max_length is not None and (ids := raw.count(b",") + 1) > max_length:
        raise from_failed(prompt_too_long(ids, max_length))
    _check_kind(raw, _arrays[kind])


def _check_kind(raw: bytes, decoder: msgspec.json.Decoder[Any]) -> None:
    if len(raw) > SMALL_BODY_BYTES:
        try:
            decoder.decode(raw)
        except msgspec.ValidationError:
            raise ApiError(400, f"prompt: {PROMPT_RULE}", param="prompt", code="invalid_value") from None


def _refuse_repeated_bias(raw: msgspec.Raw | None) -> None:
    """Refuses two biases for one id: a parser would silently drop one."""

    def collect(pairs: list[tuple[str, Any]]) -> None:
        seen = set[str]()
        for name, _ in pairs:
            if name in seen:
                message = f"logit_bias: {shown(name)} appears twice"
                raise ApiError(400, message, param="logit_bias", code="invalid_value")
            seen.add(name)

    if raw is not None:
        # Validation reports other faults.
        with suppress(ValueError):
            json.loads(bytes(raw), object_pairs_hook=collect)


def _encoding_fault(body: bytes) -> ApiError | None:
    try:
        body.decode()
    except UnicodeDecodeError as flaw:
        message = f"the body is not valid UTF-8: {flaw.reason} at byte {flaw.start}"
        return ApiError(400, message, code="invalid_json")
    return None
