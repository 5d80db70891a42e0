"""What a body is refused for before anything is built of it, and what it is not."""

import asyncio
import json
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from server import parsing
from server.base64_bytes import from_base64, is_base64, to_base64
from server.errors import ApiError
from server.neutral import NEUTRAL
from server.parsing import FIELD_BYTES, OTHER_BYTES, SMALL_BODY_BYTES, off_the_loop, parse
from server.schemas import CompletionRequest

MAX_PROMPTS, MAX_LENGTH = 8, 1000


def parsed(body: Any) -> CompletionRequest:
    return parse(body if isinstance(body, bytes) else json.dumps(body).encode(), MAX_PROMPTS, MAX_LENGTH)


def refused(body: Any) -> dict[str, Any]:
    with pytest.raises(ApiError) as caught:
        parsed(body)
    assert caught.value.status == 400
    error: dict[str, Any] = caught.value.body["error"]
    assert len(error["message"]) < 300 and len(error["param"] or "") <= 80
    return error


MANY = 100_000
LARGE: dict[str, tuple[bytes, str, str | None]] = {
    "unknown members": (b"{" + b",".join(b'"k%d":1' % i for i in range(MANY)) + b"}", "unknown_parameter", "k0"),
    "one member again and again": (b"{" + b",".join([b'"n":1'] * MANY) + b"}", "invalid_value", None),
    "a long name": (b'{"' + b"k" * MANY + b'":1}', "unknown_parameter", "k" * 80),
    "white space": (b"{" + b" " * MANY + b"}", "invalid_value", None),
    "strings": (b'{"prompt":[' + b",".join([b'"a"'] * MANY) + b"]}", "invalid_value", "prompt"),
    "strings of escapes": (b'{"prompt":[' + b",".join([b'"\\\\"'] * MANY) + b"]}", "invalid_value", "prompt"),
    "arrays": (b'{"prompt":[' + b",".join([b"[1]"] * MANY) + b"]}", "invalid_value", "prompt"),
    "ids": (b'{"prompt":[' + b",".join([b"1"] * MANY) + b"]}", "context_length_exceeded", "prompt"),
    "an object": (b'{"prompt":{' + b",".join(b'"%d":1' % i for i in range(MANY)) + b"}}", "invalid_value", "prompt"),
    "elements of two types": (b'{"prompt":["a"' + b",[]" * MANY + b"]}", "invalid_value", "prompt"),
    "objects among arrays": (b'{"prompt":[[1]' + b",{}" * MANY + b"]}", "invalid_value", "prompt"),
    "objects": (b'{"prompt":[{}' + b',{"a":1}' * MANY + b"]}", "invalid_value", "prompt"),
    "bytes": (b'{"prompt":[' + b",".join([b'{"base64":""}'] * MANY) + b"]}", "invalid_value", "prompt"),
    "members of bytes": (
        b'{"prompt":[{' + b",".join(b'"%d":1' % i for i in range(MANY)) + b"}]}",
        "invalid_value",
        "prompt",
    ),
    "biases": (
        b'{"logit_bias":{' + b",".join(b'"%d":1' % i for i in range(MANY)) + b"}}",
        "invalid_value",
        "logit_bias",
    ),
    "stops": (b'{"stop":[' + b",".join([b'"a"'] * MANY) + b"]}", "invalid_value", "stop"),
    "metadata": (b'{"metadata":{"a":"' + b"x" * MANY + b'"}}', "invalid_value", "metadata"),
    "depth": (b'{"prompt":' + b"[" * MANY + b"]" * MANY + b"}", "invalid_json", None),
    "no end": (b'{"prompt":"' + b"a" * MANY, "invalid_json", None),
    "no UTF-8": (b'{"prompt":"' + b"\xff" * MANY + b'"', "invalid_json", None),
}


@pytest.mark.parametrize("name", LARGE)
def test_oversized_request_fields_are_refused_before_validation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("validated")

    monkeypatch.setattr(CompletionRequest, "model_validate_json", fail)
    body, code, param = LARGE[name]
    error = refused(body)
    assert (error["code"], error["param"]) == (code, param)


TEXT = st.text(alphabet=st.sampled_from('a"\\[],{}\n é\u2028'), max_size=12)
BYTES = st.binary(max_size=12).map(lambda data: {"base64": to_base64(data)})
PROMPT = st.one_of(
    TEXT,
    BYTES,
    st.lists(TEXT, min_size=1, max_size=2 * MAX_PROMPTS),
    st.lists(BYTES, min_size=1, max_size=2 * MAX_PROMPTS),
    st.lists(st.integers(0, 259), min_size=1, max_size=40),
    st.lists(st.lists(st.integers(0, 259), min_size=1, max_size=6), min_size=1, max_size=2 * MAX_PROMPTS),
)


def decoded(prompt: Any) -> Any:
    """The same with bytes for their base64."""
    if isinstance(prompt, list):
        return [decoded(part) for part in prompt]
    return from_base64(prompt) if is_base64(prompt) else prompt


@settings(max_examples=300)
@given(PROMPT, st.booleans(), st.sampled_from([None, 2]))
def test_every_valid_prompt_is_accepted(prompt: Any, ascii: bool, indent: int | None) -> None:
    body = json.dumps({"prompt": prompt}, ensure_ascii=ascii, indent=indent).encode()
    is_many = isinstance(prompt, list) and not isinstance(prompt[0], int)
    if is_many and len(prompt) > MAX_PROMPTS:
        # The count is a lower bound, at least half of what is there; the rest is the plan's to refuse.
        try:
            assert parsed(body).prompt == decoded(prompt)
        except ApiError as error:
            assert error.body["error"]["param"] == "prompt"
        else:
            assert len(prompt) <= 2 * MAX_PROMPTS
    else:
        assert parsed(body).prompt == decoded(prompt)


def test_bounds_of_request_fields_are_the_documented_ones() -> None:
    assert parsed({"prompt": [5] * MAX_LENGTH}).prompt == [5] * MAX_LENGTH
    assert refused({"prompt": [5] * (MAX_LENGTH + 1)})["code"] == "context_length_exceeded"
    assert parsed({"user": "u" * (FIELD_BYTES - 2)}).user
    assert refused({"user": "u" * (FIELD_BYTES - 1)})["param"] == "user"
    assert parsed({"stop": ["s" * 500] * 64}).stop == ["s" * 500] * 64
    long = refused({"stop": ["s" * 600] * 64})["message"]
    assert long == f"stop: must have at most {FIELD_BYTES} bytes, not {64 * 604}"
    assert parsed(b"{" + b" " * (OTHER_BYTES - 2) + b"}")
    assert "white space" in refused(b"{" + b" " * (OTHER_BYTES - 1) + b"}")["message"]
    assert parsed(b'{"nope":null}')
    assert parsed({"allowed_token_ids": [*range(260)], "stop_token_ids": [], "repetition_penalty": 0.01})
    for name, value, rule in (
        ("allowed_token_ids", [], "must have at least one id (leave it out to allow all), not []"),
        ("allowed_token_ids", ["a"], "must be an array of at most 260 token ids"),
        ("stop_token_ids", [5] * 261, "must be an array of at most 260 token ids"),
        ("repetition_penalty", 0, "must be at least 0.01, not 0"),
        ("min_tokens", -1, "must be at least 0, not -1"),
    ):
        error = refused({name: value})
        assert error["param"] == name and rule in error["message"], error


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"temprature": 1}, "temprature is not a known parameter; did you mean temperature?"),
        ({"zzz": 1}, "zzz is not a known parameter"),
        ({"unmask": {"rule": "entropy", "tempo": 1}}, "unmask.tempo is not a known parameter"),
        ({"messages": []}, "messages is not a known parameter; chat is not offered: send prompt"),
        ({"logit_bias": {"a": 1}}, "logit_bias: keys must be token ids such as '36', not 'a'"),
        (
            {"unmask": {"rule": "one_step", "alpha": 1}},
            "unmask: must not have alpha with the rule 'one_step': alpha belongs to 'confidence'",
        ),
        (
            {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
            "structured_outputs: whitespace_pattern only goes with json and json_object",
        ),
        ({"stream_options": {"include_obfuscation": True}},
         "stream_options.include_obfuscation: must be false, not true"),
        ({"stop": [None, True]}, "stop: must be a string or an array of at most 64 strings, not [null, true]"),
        ({"metadata": "x"}, "metadata: must be an object, not 'x'"),
        ({"safety_identifier": 5}, "safety_identifier: must be a string, not 5"),
        ({"suffix": "b"}, "suffix: must be '', null or left out, not 'b': nothing else is supported"),
        ({"regex": "a+"}, "regex: must be null or left out, not 'a+': nothing else is supported"),
        ({"stop": ["a"] * 65}, "stop: must have at most 64 strings, not 65"),
        ({"prompt": ["a"] * 9}, "prompt: must have at most 8 prompts, not 9 or more"),
    ],
)  # fmt: skip
def test_messages_name_the_rule_and_what_was_given_once(body: Any, message: str) -> None:
    assert refused(body)["message"] == message


@pytest.mark.parametrize("bias", ['{"36":1,"036":-1}', '{"36":1,"36":-1}', '{"36":1,"7":0,"36":1}'])
def test_two_logit_biases_for_one_id_are_refused(bias: str) -> None:
    error = refused(f'{{"logit_bias":{bias}}}'.encode())
    assert error["param"] == "logit_bias" and "twice" in error["message"] and "36" in error["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[1, true]", "the body must be a JSON object, not [1, true]"),
        (b"NaN", "the body must be a JSON object, not nan"),
        (b" " * MANY + b'"a"', "the body must be a JSON object, and begin with '{', not '\"'"),
    ],
)
def test_a_body_that_is_no_object_is_told(body: bytes, message: str) -> None:
    error = refused(body)
    assert (error["code"], error["message"]) == ("invalid_value", message)


def test_choices_are_checked_up_to_the_first_that_is_wrong() -> None:
    body = json.dumps({"prompt": "x", "structured_outputs": {"choice": ["a", *[1] * 99]}})
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate_json(body)
    assert caught.value.error_count() == 1, "a message for each of many holds up the event loop"
    assert refused(body.encode())["param"] == "structured_outputs.choice.1"


def test_error_messages_shorten_the_values_that_they_quote() -> None:
    for value in ("x" * 9999, [1] * 9999, {"a": "b" * 9999}, 10**300):
        refused({"temperature": value})


@pytest.mark.parametrize("name", NEUTRAL)
def test_unsupported_fields_accept_only_their_neutral_values(name: str) -> None:
    known = NEUTRAL[name]
    fine = list(known.values) if not known.kind else [{"a": "b"} if known.kind is dict else "a"]
    for value in [*fine, None]:
        assert parsed({name: value, "n": 2}).n == 2
    for value in (7, "other", [1], {"type": "json_object"}, not (fine[0] if fine else False)):
        if value in fine or (known.kind and isinstance(value, known.kind)) or value is True and True in fine:
            continue
        error = refused({name: value})
        code = "invalid_value" if known.kind else "unsupported_parameter"
        assert (error["code"], error["param"]) == (code, name)
        assert error["message"].startswith(f"{name}: must be ")


def test_booleans_and_numbers_are_not_interchangeable() -> None:
    assert parsed({"length_penalty": 1.0, "no_repeat_ngram_size": 0})
    assert refused({"length_penalty": True})["param"] == "length_penalty"
    assert refused({"store": 0})["param"] == "store"


def test_large_bodies_are_parsed_outside_the_event_loop() -> None:
    async def where(size: int) -> str:
        return await off_the_loop(b" " * size, lambda: threading.current_thread().name)

    assert asyncio.run(where(SMALL_BODY_BYTES)) == threading.main_thread().name
    assert asyncio.run(where(SMALL_BODY_BYTES + 1)).startswith("parse")


def test_the_parser_knows_every_request_field() -> None:
    assert set(parsing.COMPLETION.fields) == {*CompletionRequest.model_fields, *NEUTRAL}
