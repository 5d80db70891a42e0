"""LangChain, LlamaIndex, LiteLLM and llm: Python programs that call OpenAI's client in turn."""

from pathlib import Path
from typing import Any

import pytest

from tests.serving import RunningServer

from .environments import installed
from .running import ASKED, busy, plain, run, texts

SCRIPTS = {
    "langchain-openai": "langchain_python.py",
    "llama-index": "llama_index_python.py",
    "litellm": "litellm_python.py",
    "llm": "llm_python.py",
}
OTHER = ASKED | {"prompt": "def f("}
STOP = {"stop": ["\n\n", "return"]}


def answers(name: str, nano: RunningServer, folder: Path) -> dict[str, Any]:
    """Those that a program gives after it has passed on text unchanged, in whole and in parts."""
    told = run(installed(name), SCRIPTS[name], "answers", nano, folder)
    (text,) = texts(nano, **ASKED)
    assert told.pop("stream") == text
    for same in ("extension", "async", "hosted_vllm"):
        assert told.pop(same, text) == text
    return told


def test_langchain_reads_answers(nano: RunningServer, tmp_path: Path) -> None:
    scores = plain(nano, **ASKED, logprobs=2)["choices"][0]["logprobs"]
    several = plain(nano, **ASKED | {"prompt": [ASKED["prompt"], "def f("]}, n=2)
    first, second, third, fourth = [choice["text"] for choice in several["choices"]]
    assert answers("langchain-openai", nano, tmp_path) == {
        "whole": first,
        "stop": texts(nano, **ASKED, **STOP)[0],
        "batch": [first, texts(nano, **OTHER)[0]],
        "generate": [[first, second], [third, fourth]],
        "usage": several["usage"]["completion_tokens"],
        "logprobs": scores,
    }


def test_llama_index_reads_answers(nano: RunningServer, tmp_path: Path) -> None:
    expected = {"whole": texts(nano, **ASKED)[0], "stop": texts(nano, **ASKED, **STOP)[0]}
    assert answers("llama-index", nano, tmp_path) == expected


def test_litellm_reads_answers(nano: RunningServer, tmp_path: Path) -> None:
    expected = plain(nano, **ASKED)
    assert answers("litellm", nano, tmp_path) == {
        "whole": [expected["choices"][0]["text"], expected["usage"]["completion_tokens"]],
        "several": texts(nano, **ASKED, **STOP, n=2),
    }


def test_llm_reads_answers(nano: RunningServer, tmp_path: Path) -> None:
    (text,) = texts(nano, **ASKED)
    told = answers("llm", nano, tmp_path)
    scored, parts = told.pop("logprobs")
    assert scored == text and parts > 0
    assert told == {"whole": text, "stop": texts(nano, **ASKED, stop="return")[0]}


ERRORS: dict[str, Any] = {
    "bad key": ["AuthenticationError", 401, "invalid_api_key"],
    "bad value": ["BadRequestError", 400, "invalid_value"],
    "unknown field": ["BadRequestError", 400, "unknown_parameter"],
    "unknown model": ["NotFoundError", 404, "model_not_found"],
    "timeout": ["APITimeoutError"],
}


@pytest.mark.parametrize("name", ["langchain-openai", "llama-index"])
def test_errors_are_those_of_openais_client(name: str, nano: RunningServer, tmp_path: Path) -> None:
    assert run(installed(name), SCRIPTS[name], "errors", nano, tmp_path) == ERRORS


def test_errors_of_litellm(nano: RunningServer, tmp_path: Path) -> None:
    """It has its own kinds, with the status."""
    told = run(installed("litellm"), SCRIPTS["litellm"], "errors", nano, tmp_path)
    assert told == {name: error[:2] for name, error in ERRORS.items()} | {"timeout": ["Timeout"]}


def test_errors_of_llm(nano: RunningServer, tmp_path: Path) -> None:
    """It shows the server's words."""
    told = run(installed("llm"), SCRIPTS["llm"], "errors", nano, tmp_path)
    assert {name: kind for name, (kind, _) in told.items()} == {
        "bad key": "AuthenticationError",
        "bad value": "BadRequestError",
        "unknown model": "NotFoundError",
    }
    assert "the API key is not valid" in told["bad key"][1] and "max_tokens" in told["bad value"][1]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("langchain-openai", ["RateLimitError", 429, "queue_full"]),
        ("llama-index", ["RateLimitError", 429, "queue_full"]),
        ("litellm", ["RateLimitError", 429]),
    ],
)
def test_a_refused_request_is_tried_again(name: str, error: list[object], full: RunningServer, tmp_path: Path) -> None:
    with busy(full, refusals=2):
        told = run(installed(name), SCRIPTS[name], "busy", full, tmp_path)
    assert told == {"refused": error, "retried": texts(full, **ASKED)[0]}
