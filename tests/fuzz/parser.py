"""The request parser: any body becomes a plan that says what the body says, or an error that a client can use.

An input is the body of `POST /v1/completions`.
"""

import json
from typing import Any, get_args
from unittest import mock

from engine import admission
from engine.config import BOS_ID, BYTE_OFFSET, ModelLimits
from engine.decoders.table import DECODERS
from engine.process.wire import decode_command, encode
from server import parsing, requests
from server.base64_bytes import from_base64
from server.errors import ApiError, Code
from server.neutral import NEUTRAL
from server.origin import Origin
from server.requests import Plan, make_plan
from server.schemas import CompletionRequest
from server.settings import ServerSettings
from tests.fuzz.target import Target

SETTINGS = ServerSettings(max_choices=8)
LIMITS = ModelLimits("fuzzed", max_length=600, vocab_size=261, block_size=8, decoders=tuple(DECODERS))
FIELDS = {*CompletionRequest.model_fields, *NEUTRAL}
MESSAGE = 1000
"""Most characters of an error's message: what it quotes is shortened."""


def one(data: bytes) -> None:
    for parse in (parsing.parse_tokenize, parsing.parse_detokenize):
        try:
            parse(data)
        except ApiError as error:
            _check_error(error, data)
    try:
        asked = parsing.parse(data, SETTINGS.max_choices, LIMITS.max_length)
        plan = make_plan(asked, Origin(), SETTINGS, LIMITS)
    except ApiError as error:
        _check_error(error, data)
    else:
        _check_plan(plan, json.loads(data))


def _check_error(error: ApiError, body: bytes) -> None:
    told = json.loads(bytes(error.response().body))["error"]
    assert error.status == (404 if told["code"] == "model_not_found" else 400), told
    assert told["code"] is None or told["code"] in get_args(Code), told
    assert 0 < len(told["message"]) <= MESSAGE, len(told["message"])
    param = told["param"]
    if param is not None:
        # An unknown field is named, too, and a nested one with its path.
        known = param.split(".")[0] in FIELDS | {"tokens", "return_token_strs"}
        assert known or told["code"] == "unknown_parameter", told


def _check_plan(plan: Plan, body: Any) -> None:
    """body: as the standard library reads it."""
    assert isinstance(body, dict)
    given = {name: value for name, value in body.items() if value is not None}
    assert given.keys() <= FIELDS
    samples = given.get("best_of", given.get("n", 1))
    prompts = _prompts(given.get("prompt", ""))
    assert plan.samples == samples and len(plan.requests) == len(prompts) * samples <= SETTINGS.max_choices
    for number, request in enumerate(plan.requests):
        assert admission.check(request, LIMITS) is None
        assert request.prompt_ids == _ids(prompts[number // samples], given, request.max_tokens)
        assert request.sample_index == number % samples
        for field in ("max_tokens", "min_tokens", "priority", "ignore_eos", "logprobs", "timeout", "trace"):
            if field in given:
                assert getattr(request, field) == given[field], field
        stop = given.get("stop", [])
        assert request.stop == [text.encode() for text in ([stop] if isinstance(stop, str) else stop)]
        bias = given.get("logit_bias", {})
        assert request.sampling.logit_bias == {int(token): value for token, value in bias.items()}
        assert decode_command(encode(request)) == request


def _prompts(prompt: Any) -> list[bytes | list[int]]:
    if isinstance(prompt, list) and not isinstance(prompt[0], int):
        return [part for each in prompt for part in _prompts(each)]
    if isinstance(prompt, dict):
        return [from_base64(prompt)]
    return [prompt.encode() if isinstance(prompt, str) else prompt]


def _ids(prompt: bytes | list[int], given: dict[str, Any], max_tokens: int) -> list[int]:
    is_text = isinstance(prompt, bytes)
    bos = [BOS_ID] if is_text and given.get("add_special_tokens", True) else []
    ids = [byte + BYTE_OFFSET for byte in prompt] if is_text else [*prompt]
    keep = given.get("truncate_prompt_tokens")
    if keep is None or len(bos) + len(ids) <= keep:
        return [*bos, *ids]
    if keep == -1:
        # Blocks that run past the end need some room.
        return [*bos, *ids][: len(bos)] + ids[len(ids) - min(len(ids), _room(given, max_tokens) - len(bos)) :]
    return [*bos, *ids[len(ids) - (keep - len(bos)) :]]


def _room(given: dict[str, Any], max_tokens: int) -> int:
    decoder = given.get("decoder", "blt")
    inexact = decoder == "blt-d"
    return LIMITS.max_length - max_tokens - (given.get("block_size", 8) - 1 if inexact and max_tokens else 0)


def _no_check_of_encoding(body: bytes) -> None:
    body.decode()


def _one_too_many(*args: Any) -> int | None:
    kept = _kept_ids(*args)
    return None if kept is None else kept + 1


_kept_ids = requests._kept_ids

TARGET = Target(
    one,
    seeds=[
        b'{"model":"fuzzed","prompt":"Hi","max_tokens":4,"temperature":0,"stop":["\\n","end"],"seed":-1}',
        b'{"prompt":[[1,70],[5]],"n":2,"best_of":2,"logprobs":3,"echo":true,"logit_bias":{"36":-1.5}}',
        b'{"prompt":{"base64":"/wAB"},"stream":true,"stream_options":{"include_usage":true},"suffix":null}',
        b'{"prompt":["a","b"],"decoder":"blt-s","draft_length":4,"exact":true,"min_tokens":2,"ignore_eos":true}',
        b'{"prompt":"thirty-nine bytes and one id before them","truncate_prompt_tokens":41}',
        b'{"prompt":"x","decoder":"blt-d","block_size":4,"unmask":{"rule":"entropy","gamma":0.5,"minus_max":true}}',
        b'{"prompt":"x","add_special_tokens":false,"include_stop_str_in_output":true,"cache_salt":"s","timeout":1.5}',
        b'{"response_format":{"type":"json_schema","json_schema":{"name":"n","schema":{"type":"object"}}}}',
        b'{"structured_outputs":{"choice":["a","b"]},"top_k":-1,"top_p":0.5,"min_p":0.1,"repetition_penalty":1.1}',
        b'{"prompt":[70,71],"allowed_token_ids":[70,2],"stop_token_ids":[71],"prompt_logprobs":0,"patches":true}',
    ],
    faults={
        "reads the body as UTF-8 unchecked": lambda: mock.patch.object(
            parsing, "_encoding_fault", _no_check_of_encoding
        ),
        "keeps one id too many": lambda: mock.patch.object(requests, "_kept_ids", _one_too_many),
    },
    words=[
        *(f'"{name}":'.encode() for name in sorted(FIELDS)),
        *(f'"{name}"'.encode() for name in DECODERS),
        *b'{} [] "" null true -1 0 1e999 9223372036854775808 NaN \\ud800 \\u0000'.split(),
        *(b"\xff", b'"prompt":"', b"[[", b'{"base64":"'),
    ],
)
