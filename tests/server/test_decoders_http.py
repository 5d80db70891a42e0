"""Decoders and their options over HTTP."""

import json
from typing import Any

import httpx
import pytest

PROMPT = {"prompt": "def f(x):", "max_tokens": 30, "temperature": 0.7, "seed": 4, "ignore_eos": True}

EXACT: list[dict[str, Any]] = [
    {"decoder": "blt-s"},
    {"decoder": "blt-s", "draft_length": 3},
    {"model": "tiny:blt-s"},
    {"model": "tiny:blt-dv"},
    {"model": "tiny:auto"},
    {"decoder": "blt-dv", "block_size": 5, "unmask": {"rule": "confidence", "alpha": 0.4}},
    {"decoder": "blt-dv", "unmask": {"rule": "entropy", "gamma": 1.5, "minus_max": True, "top_p": 0.9}},
]

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"decoder": "blt-s", "draft_length": 33}, "draft_length", "32"),
    ({"decoder": "blt-s", "draft_length": 0}, "draft_length", "1"),
    ({"decoder": "blt-d", "block_size": 9}, "block_size", "trained with blocks of up to 8"),
    ({"decoder": "blt", "draft_length": 4}, "draft_length", "option of blt-s"),
    ({"draft_length": 4}, "draft_length", "option of blt-s"),
    ({"decoder": "blt-s", "unmask": {"rule": "one_step"}}, "unmask", "blt-d and blt-dv"),
    ({"decoder": "blt-dv", "unmask": {"rule": "confidence", "gamma": 1}}, "unmask", "entropy"),
    ({"decoder": "blt-dv", "unmask": {"rule": "none"}}, "unmask.rule", "one_step"),
    ({"decoder": "blt-dv", "unmask": {"rule": "confidence", "alpha": 2}}, "unmask.alpha", "1"),
    ({"decoder": "blt-dv", "finish_patch": True}, "finish_patch", "blt-d"),
    ({"model": "tiny:blt-s", "decoder": "blt-d"}, "decoder", "left out with the model"),
    ({"decoder": "blt-x"}, "decoder", "blt-dv"),
]


def complete(url: str, **fields: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json={"model": "tiny", **PROMPT, **fields}, timeout=60)


@pytest.mark.parametrize("fields", EXACT, ids=str)
def test_exact_decoders_answer_with_the_text_of_blt(tiny_server: str, fields: dict[str, Any]) -> None:
    wanted = complete(tiny_server).json()
    found = complete(tiny_server, **fields).json()
    assert found["choices"] == wanted["choices"]
    usage = found["usage"]["fastblt"]
    assert usage["decoder"] == fields.get("decoder") or fields["model"].split(":")[1] == usage["decoder"]
    assert usage["drafted"] >= usage["accepted"]
    assert usage["rounds"] <= 30
    assert usage["bytes_read"] > usage["estimated_bytes"] / 2 > 0
    assert usage["bytes_per_global_call"] == pytest.approx(30 / usage["global_calls"], abs=0.001)


def test_block_diffusion_streams_whole_blocks_trimmed_at_the_end(tiny_server: str) -> None:
    body = {"model": "tiny", **PROMPT, "decoder": "blt-d", "logprobs": 0}
    whole = httpx.post(f"{tiny_server}/v1/completions", json=body, timeout=60).json()
    assert whole["usage"]["completion_tokens"] == 30
    assert whole["usage"]["fastblt"]["rounds"] == 4
    assert len(whole["choices"][0]["logprobs"]["bytes"]) == 30
    streamed = httpx.post(f"{tiny_server}/v1/completions", json=body | {"stream": True}, timeout=60).text
    chunks = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    assert len(chunks) < 12


@pytest.mark.parametrize(("fields", "param", "says"), REFUSED, ids=str)
def test_options_that_do_not_fit_the_decoder_are_refused_with_the_reason(
    tiny_server: str, fields: dict[str, Any], param: str, says: str
) -> None:
    response = complete(tiny_server, **fields)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["param"] == param
    assert says in error["message"]


def test_model_aliases_are_listed_and_metrics_count_by_decoder(tiny_server: str) -> None:
    names = {entry["id"] for entry in httpx.get(f"{tiny_server}/v1/models").json()["data"]}
    assert {"tiny", "tiny:blt", "tiny:blt-s", "tiny:blt-d", "tiny:blt-dv", "tiny:auto"} <= names
    complete(tiny_server, decoder="blt-s")
    metrics = httpx.get(f"{tiny_server}/metrics").text
    for name in ("committed_bytes", "rounds", "drafted_bytes", "accepted_bytes", "blt_estimated_bytes"):
        assert f'fastblt_{name}_total{{decoder="blt-s"}}' in metrics
    for name in ("calls", "rows", "read_bytes", "seconds"):
        assert f'fastblt_decoder_stage_{name}_total{{decoder="blt-s",stage="global"}}' in metrics
