"""`return_token_ids` and `stop_reason`, as vLLM means them."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import BOS_ID, BYTE_OFFSET, EOS_ID
from engine.types import Delta, Finished, Usage
from server.choice import ChoiceStream
from tests.scripted_server import ScriptedClient, body, serving
from tests.serving import RunningServer

from .test_choice_stream import events, read

ASKED = {"prompt": "naïve", "max_tokens": 24, "seed": 4, "return_token_ids": True}


def ids(text: str) -> list[int]:
    return [byte + BYTE_OFFSET for byte in text.encode()]


def ask(server: RunningServer, **fields: Any) -> list[dict[str, Any]]:
    with server.client() as http:
        answer = http.post("/v1/completions", json={**ASKED, **fields})
    assert answer.status_code == 200, answer.text
    choices: list[dict[str, Any]] = answer.json()["choices"]
    return choices


def streamed(server: RunningServer, **fields: Any) -> list[dict[str, Any]]:
    with server.client() as http:
        answer = http.post("/v1/completions", json={**ASKED, **fields, "stream": True})
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    return [choice for event in events for choice in event["choices"]]


@pytest.mark.parametrize("decoder", ["blt", "blt-s", "blt-d", "blt-dv"])
def test_ids_are_those_that_were_generated(server: RunningServer, decoder: str) -> None:
    choices = ask(server, decoder=decoder, n=2, trace=True)
    for choice in choices:
        assert choice["prompt_token_ids"] == [BOS_ID, *ids("naïve")]
        assert choice["token_ids"] == [token for told in choice["trace"]["rounds"] for token in told["ids"]]
    assert choices[0]["token_ids"] != choices[1]["token_ids"]


def test_chunks_have_each_id_once_and_those_of_the_prompt_first(server: RunningServer) -> None:
    prompts = ["a", ids("bc")]
    asked: dict[str, Any] = {"prompt": [ids("a"), ids("bc")], "n": 2, "logprobs": 1, "echo": True}
    chunks, choices = streamed(server, **asked), ask(server, **asked)
    assert len(choices) == 2 * len(prompts)
    for number, choice in enumerate(choices):
        parts = [chunk for chunk in chunks if chunk["index"] == number]
        assert parts[0]["prompt_token_ids"] == choice["prompt_token_ids"] == asked["prompt"][number // 2]
        assert all("prompt_token_ids" not in part for part in parts[1:])
        assert [token for part in parts for token in part["token_ids"]] == choice["token_ids"]
        assert [part["stop_reason"] for part in parts] == [None] * len(parts)


def test_an_end_of_sequence_is_an_id_and_no_stop_reason(server: RunningServer) -> None:
    (choice,) = ask(server, logit_bias={"2": 100}, stop=["</s>"])
    assert (choice["finish_reason"], choice["stop_reason"], choice["token_ids"]) == ("stop", None, [EOS_ID])


def test_the_stop_string_is_the_stop_reason_and_its_ids_were_generated(server: RunningServer) -> None:
    forced = {"logit_bias": {str(ids("ab"[0])[0]): 100}, "temperature": 0}
    whole, *parts = *ask(server, stop=["b", "aaa"], **forced), *streamed(server, stop=["b", "aaa"], **forced)
    for choice in (whole, parts[-1]):
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "aaa")
    assert whole["token_ids"] == ids("aaa") and whole["text"] == ""
    (cut,) = ask(server, stop=["aaa"], max_tokens=2, **forced)
    assert (cut["finish_reason"], cut["stop_reason"], cut["text"]) == ("length", None, "aa")


def test_a_stop_id_is_the_stop_reason_and_its_byte_is_text_only_if_asked_for(server: RunningServer) -> None:
    forced = {"logit_bias": {str(ids("a")[0]): 100}, "temperature": 0, "logprobs": 0, "min_tokens": 3, "stop": "ab"}
    asked: dict[str, Any] = {**forced, "stop_token_ids": ids("a")}
    for fields, text in (({}, 3), ({"include_stop_str_in_output": True}, 4)):
        (whole,), parts = ask(server, **asked, **fields), streamed(server, **asked, **fields)
        for choice in (whole, parts[-1]):
            assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", ids("a")[0])
        assert whole["text"] == "".join(part["text"] for part in parts) and len(whole["text"]) == text
        assert len(whole["logprobs"]["tokens"]) == text and len(whole["token_ids"]) == 4
    (whole,) = ask(
        server, **forced | {"stop": "aaa", "include_stop_str_in_output": True, "allowed_token_ids": ids("a")}
    )
    assert (whole["stop_reason"], whole["text"]) == ("aaa", "aaaa")


@given(st.binary(max_size=12), st.lists(st.sampled_from([b"a", "éx".encode(), b"ab", "€".encode(), b"bc"]), max_size=3))
def test_the_stop_reason_is_what_the_text_lacks(data: bytes, stops: list[bytes]) -> None:
    said = events([byte + BYTE_OFFSET for byte in data + "é€xab".encode()], stops)
    whole, pieces = read(ChoiceStream([BOS_ID], False, False, with_ids=True), said)
    generated = bytes(token - BYTE_OFFSET for token in whole.token_ids or [])
    stopped = whole.finish_reason == "stop"
    assert stopped == (whole.stop_reason is not None) and not any(piece.stop_reason for piece in pieces[:-1])
    cut = (whole.stop_reason or "").encode()
    assert not stopped or (cut in stops and generated.endswith(cut))
    assert generated.removesuffix(cut).decode(errors="replace") == whole.text


async def test_a_timeout_before_the_first_id_still_gives_the_prompt() -> None:
    async with serving(ScriptedClient()) as http:
        answer = await http.post("/v1/completions", json=body("late", return_token_ids=True))
        (choice,) = answer.json()["choices"]
        assert (choice["prompt_token_ids"], choice["token_ids"]) == ([BOS_ID, *ids("late")], [])
        (without,) = (await http.post("/v1/completions", json=body("a", return_token_ids=False))).json()["choices"]
        assert without.keys() == {"index", "text", "logprobs", "finish_reason", "stop_reason"}


async def test_the_number_of_ids_in_a_response_is_bounded() -> None:
    asked = body("nine byte", max_tokens=5, n=3, return_token_ids=True)
    total = (10 + 5) * 3
    async with serving(ScriptedClient(), max_scores=total) as http:
        assert (await http.post("/v1/completions", json=asked)).status_code == 200
    async with serving(ScriptedClient(), max_scores=total - 1) as http:
        error = (await http.post("/v1/completions", json=asked)).json()["error"]
        assert (error["param"], error["code"]) == ("return_token_ids", "too_many_scores")
        assert str(total) in error["message"] and str(total - 1) in error["message"]
        assert (await http.post("/v1/completions", json=asked | {"stream": True})).status_code == 200


def test_bytes_held_back_are_forgotten_once_they_are_text() -> None:
    stream = ChoiceStream([BOS_ID], False, False)
    stream.feed(Delta(id="x", ids=ids("ab"), text=b"a"))
    stream.feed(Delta(id="x", ids=[EOS_ID], text=b""))
    assert stream.feed(Finished(id="x", reason="stop", text=b"b", usage=Usage())).stop_reason is None
