"""`truncate_prompt_tokens`, as vLLM means it."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import BOS_ID, BYTE_OFFSET, ModelLimits
from engine.types import Request, SamplingParams
from server.errors import ApiError
from server.origin import Origin
from server.requests import make_plan
from server.schemas import CompletionRequest
from server.settings import ServerSettings
from tests.serving import RunningServer

LIMITS = ModelLimits("scripted", 40, 260, 8, decoders=("blt", "blt-d"))


def ids(data: bytes) -> list[int]:
    return [byte + BYTE_OFFSET for byte in data]


def planned(**fields: Any) -> list[list[int]]:
    plan = make_plan(CompletionRequest(**fields), Origin(), ServerSettings(), LIMITS)
    return [request.prompt_ids for request in plan.requests]


def ask(server: RunningServer, **fields: Any) -> dict[str, Any]:
    with server.client() as http:
        answer = http.post("/v1/completions", json={"max_tokens": 4, "seed": 3, **fields})
    body: dict[str, Any] = answer.json()
    return body


def test_fields_and_limits_reach_the_engines_request() -> None:
    fields: dict[str, Any] = {"temperature": 0.7, "top_p": 0.8, "top_k": 5, "min_p": 0.1, "presence_penalty": 0.2}
    fields |= {"frequency_penalty": 0.3, "repetition_penalty": 1.1, "seed": 7}
    chosen = ServerSettings(default_timeout=9.0, max_tokens_limit=9)

    def made(**more: Any) -> Request:
        (request,) = make_plan(CompletionRequest(prompt="a", **more), Origin(), chosen, LIMITS).requests
        return request

    request = made(max_tokens=9, priority=3, **fields)
    assert request.sampling == SamplingParams(**fields) and (request.priority, request.timeout) == (3, 9.0)
    assert made(max_tokens=1, timeout=2.0).timeout == 2.0
    with pytest.raises(ApiError, match="max_tokens: must be at most 9, not 10"):
        made(max_tokens=10)


@given(st.text(max_size=60), st.integers(1, 30), st.booleans())
def test_the_last_ids_stay_and_the_begin_of_sequence_of_a_string(text: str, keep: int, special: bool) -> None:
    if not (text or special):
        return
    whole = [BOS_ID] * special + ids(text.encode())
    expected = whole if len(whole) <= keep else [BOS_ID] * special + whole[len(whole) - keep + special :]
    asked: dict[str, Any] = {"max_tokens": 10, "truncate_prompt_tokens": keep}
    assert planned(prompt=text, add_special_tokens=special, **asked) == [expected]
    assert planned(prompt=[whole, [7]], **asked) == [whole[-keep:], [7]]


@pytest.mark.parametrize(("fields", "room"), [({}, 30), ({"decoder": "blt-d"}, 23), ({"max_tokens": 0}, 40)])
def test_minus_one_keeps_what_fits_beside_max_tokens(fields: dict[str, Any], room: int) -> None:
    """A block may end past max_tokens."""
    long = "x" * 100
    (kept,) = planned(prompt=long, truncate_prompt_tokens=-1, **{"max_tokens": 10, **fields})
    assert kept == [BOS_ID, *ids(b"x" * (room - 1))]
    assert planned(prompt="ab", truncate_prompt_tokens=-1, **fields) == [[BOS_ID, *ids(b"ab")]]


def test_a_prompt_too_long_for_the_model_passes_and_all_see_what_is_left(server: RunningServer) -> None:
    long = "0123456789" * 20_000
    for prompt, expected in ((long, [BOS_ID, *ids(b"56789")]), (ids(long.encode()), ids(b"456789"))):
        asked: dict[str, Any] = {"return_token_ids": True, "echo": True, "prompt_logprobs": 0, "patches": True}
        cut = ask(server, prompt=prompt, truncate_prompt_tokens=6, **asked)
        same = ask(server, prompt=expected, **asked)
        (choice,) = cut["choices"]
        assert choice["prompt_token_ids"] == expected and len(choice["prompt_logprobs"]) == 6
        assert choice == same["choices"][0]
        assert cut["usage"]["prompt_tokens"] == same["usage"]["prompt_tokens"] == 6


@pytest.mark.parametrize(
    ("value", "code", "right"),
    [
        (0, "invalid_value", "must be -1 or at least 1, not 0"),
        (-2, "invalid_value", "must be at least -1, not -2"),
        ("4", "invalid_value", "must be a valid integer, not '4'"),
        (True, "invalid_value", "must be a valid integer, not true"),
        (2**31 - 1, "context_length_exceeded", f"with 4 max_tokens, not {2**31 - 1}"),
    ],
)
def test_a_refusal_says_what_would_be_right(server: RunningServer, value: Any, code: str, right: str) -> None:
    error = ask(server, prompt="a", truncate_prompt_tokens=value)["error"]
    assert (error["param"], error["code"]) == ("truncate_prompt_tokens", code)
    assert error["message"].startswith("truncate_prompt_tokens: ") and right in error["message"]


def test_max_tokens_that_leave_no_room_are_refused_by_name(server: RunningServer) -> None:
    for keep in (-1, 5):
        error = ask(server, prompt="abcdefgh", max_tokens=2**30, truncate_prompt_tokens=keep)["error"]
        assert (error["param"], error["code"]) == ("max_tokens", "context_length_exceeded")
