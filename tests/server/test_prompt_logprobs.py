"""`prompt_logprobs` in vLLM's shape, and the whole distribution of the next byte, against the plain model."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.checkpoint import PRESETS, calibrated, random_tensors
from engine.config import BOS_ID, BYTE_OFFSET
from server.token_names import token_name
from tests import reference
from tests.scripted_server import ScriptedClient, body, serving
from tests.serving import RunningServer

TEXT = "né = [1]"
PROMPT = [BOS_ID, *(byte + BYTE_OFFSET for byte in TEXT.encode())]
ALL = 260
CLOSE = 1e-4


@pytest.fixture(scope="module")
def rows() -> Tensor:
    """The plain model's log-probabilities after each id of the prompt (len(PROMPT), 260); the model is the server's."""
    tensors = random_tensors(PRESETS["tiny"], seed=1)
    logits = reference.forward(calibrated(PRESETS["tiny"], tensors), tensors, PROMPT)
    return logits.log_softmax(-1)


def ask(server: RunningServer, **fields: Any) -> list[dict[str, Any]]:
    with server.client() as http:
        answer = http.post("/v1/completions", json={"prompt": TEXT, "max_tokens": 1, "temperature": 0, **fields})
    assert answer.status_code == 200, answer.text
    choices: list[dict[str, Any]] = answer.json()["choices"]
    return choices


def check(told: list[dict[str, Any] | None], rows: Tensor, num_top: int) -> None:
    """That an entry has the likeliest ids by rank, and the prompt's own."""
    assert told[0] is None and len(told) == len(PROMPT)
    for own, entry, row in zip(PROMPT[1:], told[1:], rows[:-1], strict=True):
        assert entry is not None
        ranks = {int(token): score["rank"] for token, score in entry.items()}
        best = sorted(rank for token, rank in ranks.items() if token != own or rank <= num_top)
        assert best == [*range(1, num_top + 1)] and len(ranks) == num_top + (ranks[own] > num_top)
        for token, score in entry.items():
            assert score["logprob"] == pytest.approx(float(row[int(token)]), abs=CLOSE)
            assert score["decoded_token"] == token_name(int(token))
            # Ties within rounding may have either order.
            assert (row > score["logprob"] + CLOSE).sum() < score["rank"] <= (row > score["logprob"] - CLOSE).sum()


@pytest.mark.parametrize("num_top", [0, 1, 7, ALL])
def test_prompt_logprobs_are_those_of_the_plain_model(server: RunningServer, rows: Tensor, num_top: int) -> None:
    for max_tokens in (0, 1):
        (choice,) = ask(server, prompt_logprobs=num_top, max_tokens=max_tokens)
        check(choice["prompt_logprobs"], rows, num_top)
        assert choice["logprobs"] is None and len(choice["text"]) <= max_tokens


def test_prompt_logprobs_and_echoed_logprobs_have_numbers_of_their_own(server: RunningServer, rows: Tensor) -> None:
    for prompt_top, top in ((6, 2), (2, 6)):
        choices = ask(server, prompt_logprobs=prompt_top, logprobs=top, echo=True, n=2, best_of=3, max_tokens=3)
        for choice in choices:
            check(choice["prompt_logprobs"], rows, prompt_top)
            told = choice["logprobs"]
            assert told["token_logprobs"][1 : len(PROMPT)] == pytest.approx(
                [float(row[own]) for own, row in zip(PROMPT[1:], rows, strict=False)], abs=CLOSE
            )
            assert {len(entry) for entry in told["top_logprobs"][1:]} <= {top, top + 1}


def test_a_stream_sends_prompt_logprobs_once(server: RunningServer) -> None:
    asked = {"prompt": TEXT, "max_tokens": 3, "temperature": 0, "prompt_logprobs": 1, "n": 2, "seed": 1}
    with server.client() as http:
        text = http.post("/v1/completions", json=asked | {"stream": True}).text
    chunks = [json.loads(line[6:])["choices"][0] for line in text.splitlines() if line.startswith("data: {")]
    for choice in ask(server, **asked):
        parts = [chunk for chunk in chunks if chunk["index"] == choice["index"]]
        assert [part["prompt_logprobs"] for part in parts if "prompt_logprobs" in part] == [choice["prompt_logprobs"]]


def test_260_logprobs_are_the_whole_distribution(server: RunningServer, rows: Tensor) -> None:
    (choice,) = ask(server, logprobs=ALL)
    (told,) = choice["logprobs"]["top_logprobs"]
    expected = {token_name(token): float(score) for token, score in enumerate(rows[-1])}
    assert told == pytest.approx(expected, abs=CLOSE) and len(told) == ALL
    assert sum(torch.tensor(list(told.values())).exp()) == pytest.approx(1, abs=1e-5)


def test_a_large_answer_is_written_as_a_small_one(server: RunningServer) -> None:
    (small,) = ask(server, prompt="x" * 3, prompt_logprobs=ALL)
    (large,) = ask(server, prompt="x" * 300, prompt_logprobs=ALL)
    for before, after in zip(small["prompt_logprobs"][1:3], large["prompt_logprobs"][1:3], strict=True):
        assert {token: score["logprob"] for token, score in after.items()} == pytest.approx(
            {token: score["logprob"] for token, score in before.items()}, abs=CLOSE
        )
    assert len(large["prompt_logprobs"]) == 301


async def test_a_timeout_before_the_prompt_is_scored_gives_nulls() -> None:
    async with serving(ScriptedClient()) as http:
        answer = await http.post("/v1/completions", json=body("late", prompt_logprobs=1, timeout=1.0))
        assert answer.json()["choices"][0]["prompt_logprobs"] == [None] * 5
        (without,) = (await http.post("/v1/completions", json=body("a"))).json()["choices"]
        assert "prompt_logprobs" not in without


@pytest.mark.parametrize(
    ("fields", "total", "param"),
    [
        ({"prompt_logprobs": 9}, 10 * 10, "prompt_logprobs"),
        ({"prompt_logprobs": 9, "n": 3, "stream": True}, 3 * 10 * 10, "prompt_logprobs"),
        ({"prompt_logprobs": 9, "logprobs": 1, "max_tokens": 7}, 10 * 10 + 7 * 2, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "logprobs": 259, "echo": True, "max_tokens": 7}, 10 * 2 + 17 * 260, "logprobs"),
        ({"logprobs": 6, "max_tokens": 7, "stream": True}, 7 * 7, "logprobs"),
    ],
)
async def test_one_bound_holds_for_all_scores_of_an_answer(fields: dict[str, Any], total: int, param: str) -> None:
    async with serving(ScriptedClient(), max_scores=total) as http:
        assert (await http.post("/v1/completions", json=body("nine byte", **fields))).status_code == 200
    async with serving(ScriptedClient(), max_scores=total - 1) as http:
        refused = await http.post("/v1/completions", json=body("nine byte", **fields))
        error = refused.json()["error"]
        assert (refused.status_code, error["param"], error["code"]) == (400, param, "too_many_scores")
        assert error["message"].startswith(f"{param}: ") and f"make {total} log-probabilities" in error["message"]
        assert all(name in error["message"] for name in fields if name.endswith("logprobs"))


@pytest.mark.parametrize("field", ["logprobs", "prompt_logprobs"])
@pytest.mark.parametrize(("value", "rule"), [(261, "at most 260, not 261"), (-1, "at least 0, not -1")])
async def test_a_number_of_alternatives_out_of_range_is_refused(field: str, value: int, rule: str) -> None:
    async with serving(ScriptedClient()) as http:
        error = (await http.post("/v1/completions", json=body("a", **{field: value}))).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_value", field) and rule in error["message"]
