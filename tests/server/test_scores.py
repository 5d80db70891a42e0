"""Log-probabilities of prompts: computed once, bounded, and never of another length than the text."""

import json
from typing import Any
from urllib.parse import urlsplit

import pytest

from server.settings import ServerSettings
from tests.raw_http import connected, post
from tests.scripted_server import ScriptedClient, body, serving
from tests.serving import RunningServer

SCORED = {"echo": True, "logprobs": 2, "max_tokens": 6, "seed": 3}


def ask(server: RunningServer, **fields: Any) -> list[dict[str, Any]]:
    with server.client() as http:
        answer = http.post("/v1/completions", json={"prompt": "abcdé", **SCORED, **fields})
    assert answer.status_code == 200, answer.text
    choices: list[dict[str, Any]] = answer.json()["choices"]
    return choices


def streamed(server: RunningServer, **fields: Any) -> list[dict[str, Any]]:
    """The choices that the chunks add up to."""
    choices: dict[int, dict[str, Any]] = {}
    asked = {"prompt": "abcdé", **SCORED, **fields, "stream": True}
    with server.client() as http, http.stream("POST", "/v1/completions", json=asked) as stream:
        for line in stream.iter_lines():
            if not line or line == "data: [DONE]":
                continue
            (part,) = json.loads(line.removeprefix("data: "))["choices"]
            whole = choices.setdefault(part["index"], part)
            if whole is not part:
                whole["text"] += part["text"]
                whole["finish_reason"] = part["finish_reason"]
                for name, entries in part["logprobs"].items():
                    whole["logprobs"][name] += entries
    return [choices[index] for index in sorted(choices)]


def test_samples_of_one_prompt_share_its_scores(server: RunningServer) -> None:
    prompts = ["abcdé", "xyz"]
    choices = ask(server, prompt=prompts, n=3)
    for number, prompt in enumerate(prompts):
        length = len(prompt.encode()) + 1
        (alone,) = ask(server, prompt=prompt)
        first = choices[3 * number]
        assert first["text"] == alone["text"]
        # Log-probabilities are exact to the last bit whatever is computed with them.
        assert first["logprobs"] == alone["logprobs"]
        for sample in choices[3 * number : 3 * number + 3]:
            assert sample["text"].startswith(prompt)
            for name, entries in sample["logprobs"].items():
                assert entries[:length] == alone["logprobs"][name][:length], name
            assert len(sample["logprobs"]["tokens"]) >= length
    assert len({choice["text"] for choice in choices[:3]}) == 3


def test_a_stream_with_scores_equals_the_whole_response(server: RunningServer) -> None:
    assert streamed(server, n=3) == ask(server, n=3)


def test_best_of_with_prompt_scores_returns_one_of_the_samples(server: RunningServer) -> None:
    (best,) = ask(server, best_of=3)
    assert best["text"] in [choice["text"] for choice in ask(server, n=3)]


async def test_the_first_sample_is_scored_before_the_others_begin() -> None:
    client = ScriptedClient()
    async with serving(client) as http:
        asked = body(["ab", "cd"], n=3, echo=True, logprobs=0, max_tokens=2)
        answer = await http.post("/v1/completions", json=asked)
        assert answer.status_code == 200
        scores = [(request.id.rpartition("-")[2], request.prompt_logprobs) for request in client.requests]
        assert sorted(scores) == [("0", True), ("1", False), ("2", False), ("3", True), ("4", False), ("5", False)]
        order = [int(number) for number, _ in scores]
        assert order.index(0) < min(order.index(1), order.index(2))
        assert order.index(3) < min(order.index(4), order.index(5))
        for number, choice in enumerate(answer.json()["choices"]):
            assert choice["text"] == ("abab" if number < 3 else "cdab")
            assert len(choice["logprobs"]["tokens"]) == 3
        without = await http.post("/v1/completions", json=asked | {"logprobs": None})
        assert [choice["text"] for choice in without.json()["choices"]] == ["abab"] * 3 + ["cdab"] * 3
        assert not any(request.prompt_logprobs for request in client.requests[6:])


async def test_a_timeout_before_the_prompt_is_scored_leaves_text_and_entries_of_equal_length() -> None:
    client = ScriptedClient()
    async with serving(client) as http:
        asked = body("late", n=2, echo=True, logprobs=1, timeout=0.5)
        for choice in (await http.post("/v1/completions", json=asked)).json()["choices"]:
            assert (choice["text"], choice["finish_reason"]) == ("late", "timeout")
            assert choice["logprobs"]["tokens"] == ["<s>", *"late"]
            assert choice["logprobs"]["token_logprobs"] == choice["logprobs"]["top_logprobs"] == [None] * 5
    first, second = client.requests
    assert first.timeout == 0.5 and second.timeout is not None and second.timeout < 0.5


@pytest.mark.parametrize(
    ("fields", "scores"),
    [
        ({"echo": True, "logprobs": 4, "max_tokens": 9}, 10 + 9),
        ({"logprobs": 4, "max_tokens": 19}, 19),
        ({"echo": True, "logprobs": 4, "max_tokens": 900, "stream": True}, 10),
        ({"echo": True, "logprobs": 0, "max_tokens": 0, "n": 8}, 10),
    ],
)
async def test_the_number_of_log_probabilities_in_a_response_is_bounded(fields: dict[str, Any], scores: int) -> None:
    total = scores * fields.get("n", 1) * (fields["logprobs"] + 1)
    client = ScriptedClient()
    async with serving(client, max_scores=total) as http:
        assert (await http.post("/v1/completions", json=body("nine byte", **fields))).status_code == 200
    async with serving(client, max_scores=total - 1) as http:
        refused = await http.post("/v1/completions", json=body("nine byte", **fields))
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert (error["param"], error["code"]) == ("logprobs", "too_many_scores")
        assert str(total) in error["message"] and str(total - 1) in error["message"]
        assert (await http.post("/v1/completions", json=body("nine byte", max_tokens=900))).status_code == 200


def test_the_default_bound_allows_scoring_a_sequence_of_maximum_length() -> None:
    assert ServerSettings().max_scores >= 24576 * 6


async def test_a_large_response_has_the_form_of_a_small_one(server: RunningServer) -> None:
    asked = {"prompt": "x" * 2000, "n": 4, "echo": True, "logprobs": 5, "max_tokens": 1, "seed": 1}
    port = urlsplit(server.url).port
    assert port
    async with connected(port) as raw:
        await raw.send(post(asked))
        large = await raw.answer(b"POST")
        assert large.headers["content-length"] == str(len(large.body)) and len(large.body) > 500_000
        await raw.send(post(asked | {"prompt": "x" * 20}))
        small = await raw.answer(b"POST")
        assert small.headers["content-type"] == large.headers["content-type"] == "application/json"
    assert list(large.json()) == list(small.json())
    choices = large.json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    for choice in choices:
        assert choice["text"].startswith("x" * 2000) and len(choice["logprobs"]["tokens"]) >= 2001
    assert large.json()["usage"]["prompt_tokens"] == 2001


def test_an_end_of_sequence_is_the_last_logprobs_entry(server: RunningServer) -> None:
    """So that programs that leave the generated byte out with a slice (lm-eval's `[ctxlen:-1]`) leave out just that."""
    (ended,) = ask(server, max_tokens=1, temperature=0, logit_bias={"2": 100}, logprobs=1)
    assert ended["finish_reason"] == "stop" and ended["text"] == "abcdé"
    assert ended["logprobs"]["tokens"][-1] == "</s>"
    assert len(ended["logprobs"]["tokens"]) == 1 + len("abcdé".encode()) + 1
    (going_on,) = ask(server, max_tokens=1, temperature=0, logit_bias={"101": 100}, logprobs=1)
    assert ended["logprobs"]["token_logprobs"][:-1] == going_on["logprobs"]["token_logprobs"][:-1]


def test_the_begin_of_sequence_can_be_left_out_of_the_prompt(server: RunningServer) -> None:
    (without,) = ask(server, add_special_tokens=False)
    (by_ids,) = ask(server, prompt=[byte + 4 for byte in "abcdé".encode()])
    assert without == by_ids and without["logprobs"]["tokens"][0] == "a"
    with server.client() as http:
        refused = http.post("/v1/completions", json={"prompt": "", "add_special_tokens": False})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "prompt"


async def test_every_chunk_has_usage_with_continuous_usage_stats(server: RunningServer) -> None:
    asked = {"prompt": ["ab", "c"], "n": 2, "max_tokens": 12, "stream": True, "ignore_eos": True}
    options = {"include_usage": True, "continuous_usage_stats": True}
    with server.client() as http:
        lines = http.post("/v1/completions", json=asked | {"stream_options": options}).text.splitlines()
    *chunks, last = [json.loads(line[6:]) for line in lines if line and line != "data: [DONE]"]
    totals = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert totals == sorted(totals) and totals[-1] == last["usage"]["completion_tokens"] == 48
    for chunk in chunks:
        usage = chunk["usage"]
        assert list(usage) == ["prompt_tokens", "completion_tokens", "total_tokens"]
        assert usage["prompt_tokens"] == 5 and usage["total_tokens"] == 5 + usage["completion_tokens"]
    assert last["choices"] == [] and last["usage"]["fastblt"]
