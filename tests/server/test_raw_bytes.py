"""Bytes in and out, as base64: those of a prompt, and those that a text was decoded from."""

import base64
import json
import re
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.config import BOS_ID, BYTE_OFFSET
from server.base64_bytes import PATTERN, from_base64, to_base64
from server.choice import ChoiceStream
from tests.serving import RunningServer

from .test_choice_stream import events, read


def ids(data: bytes) -> list[int]:
    return [byte + BYTE_OFFSET for byte in data]


def in_base64(data: bytes) -> dict[str, str]:
    return {"base64": base64.b64encode(data).decode()}


def ask(server: RunningServer, **fields: Any) -> Any:
    with server.client() as http:
        return http.post("/v1/completions", json={"max_tokens": 5, "return_bytes": True, "seed": 2, **fields}).json()


def streamed(server: RunningServer, **fields: Any) -> list[dict[str, Any]]:
    asked = {"max_tokens": 5, "return_bytes": True, "seed": 2, **fields, "stream": True}
    with server.client() as http:
        lines = http.post("/v1/completions", json=asked).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return [choice for chunk in chunks for choice in chunk["choices"]]


def bytes_of(*choices: dict[str, Any]) -> bytes:
    return b"".join(base64.b64decode(choice["bytes"]) for choice in choices)


def test_bytes_in_come_out_of_echo(server: RunningServer) -> None:
    @settings(max_examples=20, deadline=None)
    @given(st.lists(st.binary(max_size=20), min_size=1, max_size=3), st.booleans())
    def check(prompts: list[bytes], special: bool) -> None:
        prompts = prompts if special else [data or b"\xff" for data in prompts]
        asked: dict[str, Any] = {
            "prompt": [in_base64(data) for data in prompts],
            "add_special_tokens": special,
            "echo": True,
            "return_token_ids": True,
        }
        choices = ask(server, **asked)["choices"]
        for data, choice in zip(prompts, choices, strict=True):
            assert choice["prompt_token_ids"] == [BOS_ID] * special + ids(data)
            output = bytes(token - BYTE_OFFSET for token in choice["token_ids"] if token >= BYTE_OFFSET)
            assert bytes_of(choice) == data + output
            assert choice["text"] == (data + output).decode(errors="replace")

    check()


def test_bytes_continue_as_the_string_that_they_are_of(server: RunningServer) -> None:
    text = "naïve €"
    asked: dict[str, Any] = {"temperature": 0, "max_tokens": 20}
    ((one,), (two,)) = (ask(server, prompt=prompt, **asked)["choices"] for prompt in (text, in_base64(text.encode())))
    assert one == two


LETTERS = {"logit_bias": {str(token): 100 for token in ids(b"abcd")}}


@pytest.mark.parametrize(("fields", "reasons"), [({}, {"length"}), ({"stop": ["bad", "ab"], **LETTERS}, {"stop"})])
def test_the_bytes_of_chunks_make_those_of_the_whole(
    server: RunningServer, fields: dict[str, Any], reasons: set[str]
) -> None:
    asked: dict[str, Any] = {"prompt": in_base64(b"\xe2\x82"), "max_tokens": 60, "n": 2, "echo": True, **fields}
    whole, chunks = ask(server, **asked)["choices"], streamed(server, **asked)
    assert {choice["finish_reason"] for choice in whole} == reasons
    for number, choice in enumerate(whole):
        parts = [chunk for chunk in chunks if chunk["index"] == number]
        assert bytes_of(*parts) == bytes_of(choice)
        assert all(bytes_of(part).decode(errors="replace") == part["text"] for part in [*parts, choice])
        assert not any(stop.encode() in bytes_of(choice) for stop in fields.get("stop", []))


@given(
    st.binary(max_size=4),
    st.binary(max_size=12),
    st.lists(st.sampled_from([b"a", b"\xc3\xa9x", b"\x82", b"ab", b"\xe2\x82\xac"]), max_size=2),
    st.booleans(),
)
def test_bytes_are_what_the_text_was_decoded_from(prompt: bytes, data: bytes, stops: list[bytes], echo: bool) -> None:
    said = events(ids(data + "é€xab".encode()), stops)
    whole, pieces = read(ChoiceStream([BOS_ID, *ids(prompt)], echo, False, with_bytes=True), said)
    assert whole.data == (prompt if echo else b"") + b"".join(event.text for event in said)
    for piece in pieces:
        assert piece.data is not None and piece.data.decode(errors="replace") == piece.text


@given(st.text(alphabet="Az09+/=-_ \n", max_size=9) | st.binary(max_size=9).map(to_base64))
@example("0000=")
@example("0000====")
def test_only_padded_base64_in_the_standard_alphabet_is_accepted(text: str) -> None:
    if re.fullmatch(PATTERN, text):
        assert from_base64({"base64": text}) == base64.b64decode(text)
    else:
        with pytest.raises(ValueError, match="base64 must be"):
            from_base64({"base64": text})


@pytest.mark.parametrize(
    ("prompt", "right"),
    [
        ({"base64": "QQ"}, "prompt: base64 must be of A-Z, a-z, 0-9, + and /, padded with ="),
        ([{"base64": "QQ=="}, {"base64": "Q Q="}], "prompt: base64 must be of"),
        ({"base64": None}, 'bytes as {"base64": "..."}'),
        ({"base64": "QQ==", "text": "A"}, 'bytes as {"base64": "..."}'),
        ({}, 'bytes as {"base64": "..."}'),
        ([{"base64": "QQ=="}, "A"], "array of strings, of such bytes"),
        ([{"base64": "QQ=="}, [5]], "array of strings, of such bytes"),
    ],
)
def test_a_refusal_says_what_would_be_right(server: RunningServer, prompt: Any, right: str) -> None:
    error = ask(server, prompt=prompt)["error"]
    assert (error["param"], error["code"]) == ("prompt", "invalid_value") and right in error["message"]


def test_no_bytes_unless_asked_for(server: RunningServer) -> None:
    assert all("bytes" not in choice for choice in ask(server, prompt="a", return_bytes=False)["choices"])
    assert all("bytes" not in choice for choice in streamed(server, prompt="a", return_bytes=False))


def test_truncation_may_cut_bytes_anywhere(server: RunningServer) -> None:
    asked: dict[str, Any] = {"prompt": in_base64("aé€".encode()), "truncate_prompt_tokens": 3, "max_tokens": 0}
    (choice,) = ask(server, echo=True, **asked)["choices"]
    assert bytes_of(choice) == b"\x82\xac"
