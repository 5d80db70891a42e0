"""The official client, unchanged, against a real server."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.serving import API_KEYS, TINY_NAMES, RunningServer


@pytest.fixture(scope="module")
def api(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_the_openai_client_reads_a_completion(api: openai.OpenAI) -> None:
    done = api.completions.create(model="tiny", prompt="def f(", max_tokens=12, temperature=0, user="me")
    assert done.object == "text_completion"
    assert done.model == "tiny"
    assert done.id.startswith("cmpl-")
    (choice,) = done.choices
    assert choice.finish_reason == "length"
    assert done.usage
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (7, 12, 19)
    assert done.usage.model_extra and done.usage.model_extra["fastblt"]["decoder_calls"] == 12


@pytest.mark.parametrize("options", [{}, {"logprobs": 2, "echo": True}, {"n": 3, "stop": ["e", "\n"]}])
def test_an_openai_client_stream_adds_up_to_the_whole_response(api: openai.OpenAI, options: dict[str, object]) -> None:
    asked = {"model": "tiny", "prompt": ["héllo", "x = "], "max_tokens": 40, "seed": 5, **options}
    whole = api.completions.create(**asked)  # type: ignore[call-overload]
    text = [""] * len(whole.choices)
    tokens: list[list[str]] = [[] for _ in whole.choices]
    scores: list[list[float]] = [[] for _ in whole.choices]
    offsets: list[list[int]] = [[] for _ in whole.choices]
    reasons: list[str | None] = [None] * len(whole.choices)
    usage = None
    stream = api.completions.create(**asked, stream=True, stream_options={"include_usage": True})  # type: ignore[call-overload]
    for chunk in stream:
        assert usage is None
        usage = chunk.usage
        assert bool(chunk.choices) != bool(usage)
        for choice in chunk.choices:
            assert reasons[choice.index] is None
            text[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
            if choice.logprobs:
                tokens[choice.index] += choice.logprobs.tokens
                scores[choice.index] += choice.logprobs.token_logprobs
                offsets[choice.index] += choice.logprobs.text_offset
    assert text == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage and whole.usage and usage.total_tokens == whole.usage.total_tokens
    if "logprobs" in options:
        assert tokens == [choice.logprobs.tokens for choice in whole.choices]
        assert offsets == [choice.logprobs.text_offset for choice in whole.choices]
        for got, choice in zip(scores, whole.choices, strict=True):
            assert got[0] is None
            assert got[1:] == pytest.approx(choice.logprobs.token_logprobs[1:])


def test_the_openai_client_lists_and_retrieves_models(api: openai.OpenAI) -> None:
    assert [model.id for model in api.models.list()] == TINY_NAMES
    assert api.models.retrieve("tiny:blt").id == "tiny:blt"
    asked = {"prompt": "a", "temperature": 0, "max_tokens": 8}
    alias, plain = (api.completions.create(model=name, **asked) for name in ("tiny:blt", "tiny"))
    assert alias.choices[0].text == plain.choices[0].text


def test_the_openai_client_raises_its_own_error_types(api: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        api.completions.create(model="gpt", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("gpt")
    with pytest.raises(openai.BadRequestError) as bad:
        api.completions.create(model="tiny", prompt="a", max_tokens=-1)
    assert bad.value.param == "max_tokens"


def test_the_openai_client_needs_a_valid_api_key(keyed: RunningServer) -> None:
    (engine,) = Path(f"/proc/{keyed.process.pid}/task/{keyed.process.pid}/children").read_text().split()
    inherited = Path(f"/proc/{engine}/environ").read_bytes()
    assert b"PYTHONPATH=" in inherited and b"FASTBLT" not in inherited and b"the-key" not in inherited
    for key, valid in (*((key, True) for key in API_KEYS), ("the-key-", False), ("#", False)):
        with openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=key, max_retries=0) as client:
            if valid:
                assert client.models.list().data
            else:
                with pytest.raises(openai.AuthenticationError) as refused:
                    client.models.list()
                assert refused.value.code == "invalid_api_key"
    with keyed.client() as http:
        assert [http.get(path).status_code for path in ("/health/live", "/health/ready", "/metrics")] == [200] * 3
        assert http.get("/version").status_code == http.get("/openapi.json").status_code == 401
    assert "the-key" not in keyed.log.read_text()
    assert " 2 API keys\n" in keyed.log.read_text()
