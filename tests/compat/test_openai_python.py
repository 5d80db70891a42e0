"""OpenAI's Python client, the oldest major version in use and the newest."""

from pathlib import Path
from typing import Any

import pytest

from tests.serving import RunningServer

from .environments import Program, installed
from .running import ASKED, busy, draining, plain, run, texts

SCRIPT = "openai_python.py"


@pytest.fixture(scope="module", params=["openai-1", "openai-3"])
def program(request: pytest.FixtureRequest) -> Program:
    return installed(request.param)


@pytest.fixture(scope="module")
def answers(program: Program, nano: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(program, SCRIPT, "answers", nano, tmp_path_factory.mktemp("answers"))


def test_whole_answers_are_the_servers(answers: dict[str, Any], nano: RunningServer) -> None:
    told, expected = answers["whole"], plain(nano, **ASKED)
    assert told["choices"] == expected["choices"] and told["usage"]["fastblt"] and told["model"] == "nano"
    options = {"n": 2, "logprobs": 2, "echo": True, "stop": ["\n\n", "return"]}
    assert answers["several"] == plain(nano, **ASKED, **options)["choices"]
    text, decoder = answers["extension"]
    assert [text] == texts(nano, **ASKED) and decoder == "blt-s"
    assert answers["headers"] == ["a-request", text]


def test_streams_add_up_to_whole_answers(answers: dict[str, Any], nano: RunningServer) -> None:
    expected = plain(nano, **ASKED)
    text, usage = answers["stream"]
    assert text == expected["choices"][0]["text"] == answers["async stream"]
    assert usage["completion_tokens"] == expected["usage"]["completion_tokens"]
    assert answers["stream left early"] is True


def test_concurrent_requests_have_their_own_answers(answers: dict[str, Any], nano: RunningServer) -> None:
    expected = [texts(nano, **ASKED | {"seed": seed})[0] for seed in range(4)]
    assert answers["async"] == expected and len(set(expected)) > 1


def test_models_are_listed(answers: dict[str, Any]) -> None:
    assert answers["models"][0] == "nano" and "nano:blt-s" in answers["models"] and answers["model"] == "nano:blt-s"
    assert answers["async error"] == ["NotFoundError", 404, "model_not_found", "model"]


def test_errors_are_the_clients_own(program: Program, nano: RunningServer, tmp_path: Path) -> None:
    assert run(program, SCRIPT, "errors", nano, tmp_path) == {
        "bad key": ["AuthenticationError", 401, "invalid_api_key", None],
        "bad value": ["BadRequestError", 400, "invalid_value", "max_tokens"],
        "unknown field": ["BadRequestError", 400, "unknown_parameter", "nope"],
        "unknown model": ["NotFoundError", 404, "model_not_found", "model"],
        "bad value, streamed": ["BadRequestError", 400, "invalid_value", "top_p"],
        "timeout": ["APITimeoutError"],
    }


def test_a_refused_request_is_tried_again(program: Program, full: RunningServer, tmp_path: Path) -> None:
    with busy(full, refusals=2):
        told = run(program, SCRIPT, "busy", full, tmp_path)
    assert told["refused"] == ["RateLimitError", 429, "queue_full", None]
    assert [told["retried"]] == texts(full, **ASKED)


def test_a_server_that_shuts_down_says_so(program: Program, tmp_path: Path) -> None:
    with draining(tmp_path) as server:
        told = run(program, SCRIPT, "draining", server, tmp_path)
    assert told["refused"] == ["InternalServerError", 503, "draining", None]
