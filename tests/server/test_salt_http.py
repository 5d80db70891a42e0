"""Cached prefixes are no oracle: what one API key, or one cache_salt, has sent is unknown to the others."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.memory.prefix import BLOCK
from server import salt
from server.salt import salt_of
from server.schemas import MAX_SALT
from tests.serving import API_KEYS, RunningServer

ONE, TWO = API_KEYS
KEYS = [b"", b"one", b"two"]


def ask(server: RunningServer, key: str, prompt: str, **fields: Any) -> tuple[str, int, int]:
    """The text, and how many ids the prompt has and how many of them were cached."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True} | fields
    with server.client(headers={"authorization": f"Bearer {key}"}) as http:
        response = http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    usage = answer["usage"]
    return answer["choices"][0]["text"], usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


def secret(name: str) -> str:
    """A prompt of two blocks and some bytes that no other test sends."""
    return f"{name}: {'a secret ' * BLOCK}"[: 2 * BLOCK + 5]


def test_the_guess_of_another_keys_prompt_finds_nothing(keyed: RunningServer) -> None:
    prompt = secret("guess")
    first, _, cold = ask(keyed, ONE, prompt)
    guess, _, known = ask(keyed, TWO, prompt)
    again, _, own = ask(keyed, ONE, prompt)
    assert (cold, known, own) == (0, 0, 2 * BLOCK)
    assert first == guess == again


def test_a_cache_salt_shares_only_within_its_key(keyed: RunningServer) -> None:
    prompt = secret("salted")
    ways = [(key, fields) for key in (ONE, TWO) for fields in ({}, {"cache_salt": "a"}, {"cache_salt": "b"})]
    assert [ask(keyed, key, prompt, **fields)[2] for key, fields in ways] == [0] * 6
    assert [ask(keyed, key, prompt, **fields)[2] for key, fields in ways] == [2 * BLOCK] * 6
    assert ask(keyed, ONE, prompt, cache_salt=None)[2] == 2 * BLOCK


def test_samples_of_a_request_share_under_its_salt(keyed: RunningServer) -> None:
    fields = {"cache_salt": "s", "n": 2, "echo": True, "logprobs": 0}
    before = keyed.metrics("fastblt_prompt_cached_bytes_total")
    ask(keyed, ONE, secret("samples"), **fields)
    after = keyed.metrics("fastblt_prompt_cached_bytes_total")
    # The second waits for the first, which scores the prompt.
    assert sum(after.values()) - sum(before.values()) == 2 * BLOCK


def test_metrics_count_what_answers_tell(keyed: RunningServer) -> None:
    def counters() -> list[float]:
        return [sum(keyed.metrics(f"fastblt_prompt_{name}_total").values()) for name in ("cached_bytes", "bytes")]

    before, told = counters(), []
    for key in (ONE, TWO, ONE, TWO):
        told.append(ask(keyed, key, secret("metrics"))[1:])
    cached, computed = (after - first for after, first in zip(counters(), before, strict=True))
    assert cached == sum(found for _, found in told) == 2 * 2 * BLOCK
    assert cached + computed == sum(length for length, _ in told)


def test_a_request_keeps_its_salt_when_the_engine_restarts(keyed: RunningServer) -> None:
    prompt = secret("restart")
    body = {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": 1_800,
        # One sequence might end before the engine does.
        "n": 16,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    restarts = sum(keyed.metrics("fastblt_engine_restarts_total").values())
    with (
        keyed.client(headers={"authorization": f"Bearer {ONE}"}) as http,
        http.stream("POST", "/v1/completions", json=body) as response,
    ):
        events = response.iter_lines()
        next(events)
        keyed.kill_children()
        assert [event for event in events if event][-1] == "data: [DONE]"
    assert sum(keyed.metrics("fastblt_engine_restarts_total").values()) == restarts + 1
    assert ask(keyed, TWO, prompt)[2] == 0
    assert ask(keyed, ONE, prompt)[2] == 2 * BLOCK


@pytest.mark.parametrize("value", ["", "x" * (MAX_SALT + 1), 5, ["a"], True])
def test_a_wrong_cache_salt_is_refused_by_name(keyed: RunningServer, value: object) -> None:
    with keyed.client(headers={"authorization": f"Bearer {ONE}"}) as http:
        response = http.post("/v1/completions", json={"prompt": "a", "cache_salt": value})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, "cache_salt", "invalid_value")
    assert f"cache_salt: must be a string of 1 to {MAX_SALT} characters, not " in error["message"]


def test_an_open_server_has_one_salt_and_those_that_requests_give(server: RunningServer) -> None:
    prompt = secret("open")
    assert [ask(server, key, prompt)[2] for key in (ONE, TWO)] == [0, 2 * BLOCK]
    assert [ask(server, key, prompt, cache_salt="a")[2] for key in (ONE, TWO)] == [0, 2 * BLOCK]


GIVEN = st.none() | st.text(min_size=1, max_size=20)
NAMED = st.tuples(st.sampled_from(KEYS), GIVEN)


@given(one=NAMED, two=NAMED)
def test_salts_are_equal_exactly_where_key_and_cache_salt_are(
    one: tuple[bytes, str | None], two: tuple[bytes, str | None]
) -> None:
    assert (salt_of(*one) == salt_of(*two)) == (one == two)


def test_a_salt_cannot_be_computed_from_a_key_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    here = salt_of(b"key", None)
    monkeypatch.setattr(salt, "_secret", bytes(32))
    assert salt_of(b"key", None) != here and b"key" not in here
