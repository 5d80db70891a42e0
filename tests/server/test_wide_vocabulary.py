"""Ids beyond the bytes: a model that has them is served as transformers would run it, and they are no text."""

from collections.abc import Iterator
from typing import Any

import pytest

from engine.config import BYTE_OFFSET, text_of
from tests.models import HF_MODELS, hf_logits
from tests.serving import RunningServer, running_server

MODEL = HF_MODELS["264-ids"]()
PROMPT = [1, *(byte + BYTE_OFFSET for byte in b"some ids"), 262, 260, *(byte + BYTE_OFFSET for byte in b" more")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("264-ids")
    MODEL.save_pretrained(folder)
    with running_server(folder, folder / "log") as running:
        yield running


def ask(server: RunningServer, **options: Any) -> dict[str, Any]:
    body = {"prompt": PROMPT, "temperature": 0, "ignore_eos": True, "logprobs": 0, "max_tokens": 24} | options
    with server.client() as http:
        response = http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def likeliest(bias: dict[int, float], count: int) -> list[int]:
    """What transformers' plain forward pass makes likeliest, an id at a time."""
    ids = list(PROMPT)
    for _ in range(count):
        logits = hf_logits(MODEL, ids)[-1]
        for token, value in bias.items():
            logits[token] += value
        ids.append(int(logits.argmax()))
    return ids[len(PROMPT) :]


@pytest.mark.parametrize("decoder", ["blt", "blt-s", "auto"])
def test_ids_beyond_the_bytes_are_sampled_and_reported_but_are_no_text(server: RunningServer, decoder: str) -> None:
    # So that they come between bytes.
    bias = {260: 1.5, 261: 1.5, 262: 1.5, 263: 1.5}
    ids = likeliest(bias, 24)
    assert {260, 261, 262, 263} & set(ids)
    assert text_of(ids)
    answer = ask(server, decoder=decoder, logit_bias={str(token): value for token, value in bias.items()})
    (choice,) = answer["choices"]
    assert choice["text"] == text_of(ids).decode(errors="replace")
    assert choice["logprobs"]["bytes"] == [token - 4 if 4 <= token < 260 else None for token in ids]
    names = [name for token, name in zip(ids, choice["logprobs"]["tokens"], strict=True) if token >= 260]
    assert names == [f"<{token}>" for token in ids if token >= 260]
    assert answer["usage"]["completion_tokens"] == len(ids)


def test_output_of_only_ids_beyond_the_bytes_does_not_crash_the_engine(server: RunningServer) -> None:
    for _ in range(2):
        (choice,) = ask(server, logit_bias={"262": 100})["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("", "length")
        assert choice["logprobs"]["tokens"] == ["<262>"] * 24
    with server.client() as http:
        assert http.get("/health/ready").status_code == 200


def test_a_prompt_may_hold_ids_beyond_the_bytes_and_its_echo_leaves_them_out(server: RunningServer) -> None:
    (choice,) = ask(server, echo=True, max_tokens=1)["choices"]
    assert choice["text"].startswith("some ids more")
    assert choice["logprobs"]["tokens"][9:11] == ["<262>", "<260>"]


def test_a_stop_string_is_found_across_ids_beyond_the_bytes(server: RunningServer) -> None:
    bias = dict.fromkeys((*(byte + BYTE_OFFSET for byte in b"xyz"), 262), 20.0)
    ids = likeliest(bias, 24)
    between = next(at for at in range(1, 23) if ids[at] == 262 and 262 not in (ids[at - 1], ids[at + 1]))
    stop = text_of(ids[between - 1 : between + 2]).decode()
    assert len(stop) == 2
    (choice,) = ask(server, logit_bias={str(token): value for token, value in bias.items()}, stop=[stop])["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == text_of(ids).decode().partition(stop)[0]


def test_ids_beyond_the_vocabulary_are_refused(server: RunningServer) -> None:
    with server.client() as http:
        for body in ({"prompt": [1, 264]}, {"prompt": "a", "logit_bias": {"264": 1}}):
            response = http.post("/v1/completions", json=body)
            assert response.status_code == 400
            assert "263" in response.json()["error"]["message"]
