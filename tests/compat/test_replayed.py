"""Load tools that do not install here: what they send, written anew, and what they read of the answers.

vLLM's and SGLang's benchmarks come only with their engines, and inference-perf wants Python 3.12.
"""

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.serving import RunningServer

from .running import ASKED, plain

SECONDS = 180
REQUESTS, OUTPUT_TOKENS = 3, 24


@dataclass
class Measured:
    """What vLLM's benchmark takes down of one request."""

    text: str = ""
    arrivals: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    ended: bool = False
    pending: bytes = b""

    def take(self, part: bytes) -> None:
        """A part of the stream as it came: events end with an empty line, and comments are passed over."""
        *events, self.pending = (self.pending + part).split(b"\n\n")
        for event in map(bytes.decode, events):
            if event.startswith(":"):
                continue
            assert not self.ended and event.startswith("data: ")
            if event == "data: [DONE]":
                self.ended = True
                continue
            chunk = json.loads(event.removeprefix("data: "))
            if chunk["choices"]:
                self.text += chunk["choices"][0]["text"]
                self.arrivals += 1
            else:
                self.prompt_tokens = chunk["usage"]["prompt_tokens"]
                self.completion_tokens = chunk["usage"]["completion_tokens"]


async def measure(session: httpx.AsyncClient, body: dict[str, Any], number: int) -> Measured:
    measured = Measured()
    headers = {"Authorization": "Bearer any", "x-request-id": f"bench-{number}"}
    async with session.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["x-request-id"] == f"bench-{number}"
        async for part in response.aiter_bytes():
            measured.take(part)
    return measured


PROMPT = "def f(héllo"
PLAIN: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True}
USAGE: dict[str, Any] = {"stream_options": {"include_usage": True}}
# Temperature and seed as given by its flags.
VLLM = PLAIN | USAGE | {"repetition_penalty": 1.0, "logprobs": None, "temperature": 0.0, "seed": 0}
FLAGS = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
BODIES: dict[str, dict[str, Any]] = {
    "vllm-bench-serve": VLLM,
    "vllm-bench-serve-flags": VLLM | FLAGS,
    "vllm-bench-serve-logprobs": VLLM | {"logprobs": 1},
    "vllm-bench-serve-ids": VLLM | {"prompt": [1, *(byte + 4 for byte in PROMPT.encode())]},
    "sglang-benchmark": PLAIN | {"temperature": 0.0, "best_of": 1},
    "inference-perf": PLAIN | USAGE | {"seed": 0},
}


@pytest.mark.parametrize("program", BODIES)
async def test_requests_of_a_benchmark_are_answered(tiny_server: str, program: str) -> None:
    asked = BODIES[program]
    whole = {name: value for name, value in asked.items() if name != "stream_options"}
    async with httpx.AsyncClient(base_url=tiny_server, timeout=SECONDS) as session:
        body = asked | {"stream": True}
        several = await asyncio.gather(*(measure(session, body, number) for number in range(REQUESTS)))
        expected = (await session.post("/v1/completions", json=whole)).json()
    counts = (13, OUTPUT_TOKENS) if "stream_options" in asked else (None, None)
    assert expected["usage"]["prompt_tokens"] == 13
    for measured in several:
        assert measured.ended and measured.pending == b"" and measured.arrivals
        assert measured.text == expected["choices"][0]["text"]
        assert (measured.prompt_tokens, measured.completion_tokens) == counts


def test_inference_perf_finds_its_metrics(nano: RunningServer) -> None:
    """It asks Prometheus for vLLM's names, which `--metric-aliases vllm` adds."""
    before = nano.metrics("vllm:")
    made = plain(nano, **ASKED)["usage"]
    grown = {name: value - before[name] for name, value in nano.metrics("vllm:").items()}

    def growth(name: str) -> float:
        found = [value for series, value in grown.items() if series.partition("{")[0] == f"vllm:{name}"]
        assert found, name
        return sum(found)

    assert growth("prompt_tokens_total") == made["prompt_tokens"]
    assert growth("generation_tokens_total") == made["completion_tokens"]
    counted = ["request_success_total", "e2e_request_latency_seconds_count", "time_to_first_token_seconds_count"]
    counted += ["request_time_per_output_token_seconds_count", "request_queue_time_seconds_count"]
    assert [growth(name) for name in counted] == [1] * 5
    assert growth("num_requests_waiting") == growth("num_requests_running") == 0
    assert growth("kv_cache_usage_perc") >= 0


def test_vllm_bench_finds_the_model(tiny_server: str) -> None:
    """Without --model it takes the first that is listed: `id` to ask for, `root` to name the tokenizer by."""
    first = httpx.get(f"{tiny_server}/v1/models").json()["data"][0]
    assert first["id"] == "tiny" and first["root"] == "tiny"
