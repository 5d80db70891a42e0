"""`patches` over HTTP, against what an engine in this process reports of the same request."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import BOS_ID, BYTE_OFFSET, PatchingRule
from engine.engine import Engine
from engine.types import DecoderName, Request, SamplingParams
from server.choice import empty_patches
from tests.engines import Output, make_engine, run
from tests.scripted_server import ScriptedClient, body, serving
from tests.serving import RunningServer

PROMPT = "naïve = "
PROMPT_IDS = [BOS_ID, *(byte + BYTE_OFFSET for byte in PROMPT.encode())]
BASE = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "temperature": 0.9, "seed": 7, "ignore_eos": True}
BYTES_ALONE = {"logit_bias": {str(special): -100 for special in range(BYTE_OFFSET)}}


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return make_engine(tiny_model, num_threads=1)


def told(engine: Engine, **fields: Any) -> Output:
    base = {"prompt_ids": PROMPT_IDS, "max_tokens": 40, "sampling": SamplingParams(temperature=0.9, seed=7)}
    return run(engine, [Request(**{"id": "a", **base, "ignore_eos": True, "patches_from": 0, **fields})])["a"]


def whole(server: RunningServer, **fields: Any) -> list[dict[str, Any]]:
    with server.client() as http:
        response = http.post("/v1/completions", json={**BASE, "patches": True, **fields})
    assert response.status_code == 200, response.text
    choices: list[dict[str, Any]] = response.json()["choices"]
    return choices


def streamed(server: RunningServer, **fields: Any) -> list[dict[str, Any]]:
    """The choices of all chunks."""
    with server.client() as http:
        text = http.post("/v1/completions", json={**BASE, "patches": True, "stream": True, **fields}).text
    assert text.endswith("data: [DONE]\n\n")
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    return [choice for chunk in chunks for choice in chunk["choices"]]


def joined(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """What a client makes of the chunks of one choice."""
    first, *later = [chunk for chunk in chunks if chunk["index"] == index]
    patches = dict(first["patches"])
    for chunk in later:
        patches["entropies"] = patches["entropies"] + chunk["patches"]["entropies"]
        patches["starts"] = patches["starts"] + chunk["patches"]["starts"]
        assert {**chunk["patches"], "entropies": 0, "starts": 0} == {**patches, "entropies": 0, "starts": 0}
    text = "".join(chunk["text"] for chunk in (first, *later))
    return {**(later or [first])[-1], "text": text, "patches": patches}


@pytest.mark.parametrize("decoder", ["blt", "blt-s", "blt-d", "blt-dv", "auto"])
def test_patches_of_a_response_are_the_engines(server: RunningServer, engine: Engine, decoder: DecoderName) -> None:
    wanted = told(engine, decoder=decoder)
    for choice in (*whole(server, decoder=decoder), joined(chunks := streamed(server, decoder=decoder))):
        patches = choice["patches"]
        assert patches["entropies"] == pytest.approx(wanted.entropies, abs=1e-4)
        assert patches["entropies"] == [float(f"{np.float32(entropy):.9g}") for entropy in patches["entropies"]]
        assert patches["starts"] == wanted.starts
        assert patches["output_start"] == len(PROMPT_IDS)
        assert patches["threshold"] == engine.model_config.patching.threshold
    assert len(wanted.starts) > 10
    assert len(chunks[0]["patches"]["entropies"]) >= len(PROMPT_IDS)


@pytest.mark.parametrize("fields", [{}, {"echo": True}, {"trace": True, "logprobs": 1}, {"n": 2}, {"best_of": 2}])
def test_streamed_patches_add_up_to_the_whole_response(server: RunningServer, fields: dict[str, Any]) -> None:
    prompts = [PROMPT, "x" * 80]
    choices = whole(server, prompt=prompts, **fields)
    assert [choice["patches"]["output_start"] for choice in choices] == [
        length for length in (len(PROMPT_IDS), 81) for _ in range(fields.get("n", 1))
    ]
    assert all(len(choice["patches"]["entropies"]) == choice["patches"]["output_start"] + 39 for choice in choices)
    if "best_of" not in fields:
        chunks = streamed(server, prompt=prompts, **fields)
        for index, choice in enumerate(choices):
            found = joined(chunks, index)
            assert (found["text"], found["patches"]) == (choice["text"], choice["patches"])


def test_patches_of_a_prompt_alone_have_no_output(server: RunningServer) -> None:
    (longer,) = whole(server)
    for fields in ({}, {"echo": True}, {"echo": True, "logprobs": 0}, {"decoder": "blt-d"}):
        (choice,) = whole(server, max_tokens=0, **fields)
        found = joined(streamed(server, max_tokens=0, **fields))
        assert (found["text"], found["patches"]) == (choice["text"], choice["patches"])
        assert choice["finish_reason"] == "length" and choice["text"] == (PROMPT if "echo" in fields else "")
        assert choice["patches"]["entropies"] == longer["patches"]["entropies"][: len(PROMPT_IDS)]
        assert choice["patches"]["starts"] == [at for at in longer["patches"]["starts"] if at <= len(PROMPT_IDS)]


def test_patches_leave_out_the_stop_string(server: RunningServer) -> None:
    (free,) = whole(server, **BYTES_ALONE, logprobs=0)
    data = bytes(free["logprobs"]["bytes"])
    stop, place = next(
        (data[at : at + 2].decode(), at)
        for at in range(15, 37)
        if data[at : at + 2].isascii() and data.index(data[at : at + 2]) == at
    )
    for choice in (*whole(server, **BYTES_ALONE, stop=stop), joined(streamed(server, **BYTES_ALONE, stop=stop))):
        assert choice["finish_reason"] == "stop"
        known = len(PROMPT_IDS) + place
        assert choice["patches"]["entropies"] == free["patches"]["entropies"][:known]
        assert choice["patches"]["starts"] == [at for at in free["patches"]["starts"] if at <= known]


def test_responses_have_no_patches_unless_requested(server: RunningServer) -> None:
    (choice,) = whole(server, patches=False)
    assert choice.keys() == {"index", "text", "logprobs", "finish_reason", "stop_reason"}
    assert all(chunk.keys() == choice.keys() for chunk in streamed(server, patches=None))
    with server.client() as http:
        refused = http.post("/v1/completions", json={**BASE, "patches": 1})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "patches")


async def test_the_number_of_entropies_in_a_response_is_bounded() -> None:
    client = ScriptedClient()
    asked = body(["nine byte"] * 2, n=3, patches=True, max_tokens=5)
    async with serving(client, max_scores=2 * 3 * (10 + 5) - 1) as http:
        refused = await http.post("/v1/completions", json=asked)
        error = refused.json()["error"]
        assert (refused.status_code, error["param"], error["code"]) == (400, "patches", "too_many_scores")
        assert "90 entropies; at most 89" in error["message"]
        for fewer in ({"max_tokens": 4}, {"stream": True}, {"patches": False}):
            assert (await http.post("/v1/completions", json=asked | fewer)).status_code == 200


async def test_a_timeout_before_the_prompt_has_run_gives_empty_patches() -> None:
    async with serving(ScriptedClient()) as http:
        answer = await http.post("/v1/completions", json=body("late", patches=True, timeout=0.1))
        (choice,) = answer.json()["choices"]
        assert choice["finish_reason"] == "timeout"
        assert choice["patches"] == empty_patches(PatchingRule(), 5).model_dump()


@pytest.mark.parametrize(
    ("rule", "shown"),
    [
        (PatchingRule(threshold=1.5), (1.5, None, None)),
        (PatchingRule(threshold=1.5, threshold_add=0.2, max_patch_length=8), (1.5, 0.2, 8)),
        (PatchingRule(threshold=0.7, monotonic=True), (None, 0.7, None)),
        (PatchingRule(mode="bytes"), (None, None, 1)),
    ],
)
def test_patches_describe_every_patching_rule(rule: PatchingRule, shown: tuple[Any, ...]) -> None:
    patches = empty_patches(rule, 3)
    assert (patches.threshold, patches.rise, patches.max_patch_length) == shown
