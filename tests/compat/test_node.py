"""Programs for Node: OpenAI's client, Vercel's AI SDK, autocannon."""

import json
from pathlib import Path

from tests.serving import RunningServer

from .environments import installed
from .running import ASKED, RECIPES, busy, plain, run, run_recipe, texts

CLIENT, SDK = "openai_node.mjs", "ai_sdk.mjs"


def test_openais_client_reads_answers_and_streams(nano: RunningServer, tmp_path: Path) -> None:
    told, expected = run(installed("openai-node"), CLIENT, "answers", nano, tmp_path), plain(nano, **ASKED)
    assert told["whole"]["choices"] == expected["choices"]
    options = {"n": 2, "logprobs": 2, "echo": True, "stop": ["\n\n", "return"]}
    assert told["several"] == plain(nano, **ASKED, **options)["choices"]
    text, usage = told["stream"]
    assert text == expected["choices"][0]["text"]
    assert usage["completion_tokens"] == expected["usage"]["completion_tokens"]
    assert told["stream left early"] == 1
    assert told["extension"] == [text, "blt-s"]
    assert told["models"][0] == "nano" and "nano:blt-s" in told["models"]


def test_openais_client_raises_its_own_errors(nano: RunningServer, tmp_path: Path) -> None:
    assert run(installed("openai-node"), CLIENT, "errors", nano, tmp_path) == {
        "bad key": ["AuthenticationError", 401, "invalid_api_key", None],
        "bad value": ["BadRequestError", 400, "invalid_value", "max_tokens"],
        "unknown field": ["BadRequestError", 400, "unknown_parameter", "nope"],
        "unknown model": ["NotFoundError", 404, "model_not_found", "model"],
        "timeout": ["APIConnectionTimeoutError"],
        "abort": ["APIUserAbortError"],
    }


def test_openais_client_tries_again(full: RunningServer, tmp_path: Path) -> None:
    with busy(full, refusals=2):
        told = run(installed("openai-node"), CLIENT, "busy", full, tmp_path)
    assert told["refused"] == ["RateLimitError", 429, "queue_full", None]
    assert [told["retried"]] == texts(full, **ASKED)


def framed(prompt: str) -> dict[str, object]:
    """The AI SDK makes a dialogue of every prompt, and has no setting that it should not."""
    return ASKED | {"prompt": f"user:\n{prompt}\n\nassistant:\n", "stop": ["\nuser:"]}


def test_the_ai_sdk_reads_answers_and_streams(nano: RunningServer, tmp_path: Path) -> None:
    told = run(installed("ai-sdk"), SDK, "answers", nano, tmp_path)
    asked = framed(ASKED["prompt"])
    assert asked.items() <= told["body"].items()
    expected = plain(nano, **asked)
    (choice,) = expected["choices"]
    assert told["whole"] == [choice["text"], choice["finish_reason"], expected["usage"]["completion_tokens"]]
    assert told["stream"] == told["whole"]
    assert told["extension"] == [choice["text"], "blt-s"]


def test_the_ai_sdk_raises_its_own_errors(nano: RunningServer, tmp_path: Path) -> None:
    assert run(installed("ai-sdk"), SDK, "errors", nano, tmp_path) == {
        "bad key": [401, "invalid_api_key"],
        "bad value": [400, "context_length_exceeded"],
        "unknown model": [404, "model_not_found"],
        "timeout": "TimeoutError",
    }


def test_the_ai_sdk_tries_again(full: RunningServer, tmp_path: Path) -> None:
    with busy(full, refusals=2):
        told = run(installed("ai-sdk"), SDK, "busy", full, tmp_path)
    assert told["refused"] == [429, "queue_full"]
    assert [told["retried"]] == texts(full, **framed(ASKED["prompt"]))


def test_the_recipe_of_the_ai_sdk(nano: RunningServer, tmp_path: Path) -> None:
    asked = framed("def f(") | {"max_tokens": 16, "temperature": 0}
    assert [run_recipe(installed("ai-sdk"), RECIPES["ai-sdk"], nano, tmp_path)] == texts(nano, **asked)


def test_autocannon_counts_only_successes(nano: RunningServer, tmp_path: Path) -> None:
    told = json.loads(run_recipe(installed("autocannon"), RECIPES["autocannon"], nano, tmp_path))
    assert (told["2xx"], told["non2xx"], told["errors"], told["timeouts"]) == (6, 0, 0, 0)
    assert told["statusCodeStats"] == {"200": {"count": 6}} and told["throughput"]["total"] > 0
