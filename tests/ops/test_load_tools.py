"""Load tools as they come: guidellm itself, and vLLM's `bench serve` rewritten, which comes only with its engine."""

import asyncio
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest

from server import tokenizer_files

SECONDS = 180
REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 3, 32, 24


def answered(url: str, route: str) -> float:
    """How often the server has said 200 there."""
    told = httpx.get(f"{url}/metrics").text
    found = re.search(rf'^fastblt_http_responses_total{{route="{route}",status="200"}} (\S+)', told, re.M)
    return float(found[1]) if found else 0.0


def test_guidellm_measures_the_server(tiny_server: str, tmp_path: Path) -> None:
    tokenizer_files.write(tmp_path / "tokenizer")
    health = answered(tiny_server, "/health")
    options = {
        # It looks at /health before anything else.
        "backend": f"kind=openai_http,target={tiny_server},request_format=/v1/completions,validate_backend=true",
        "profile": "kind=concurrent,streams=2",
        "data": f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}",
        "tokenizer": f"kind=huggingface_auto,model={tmp_path / 'tokenizer'}",
        "constraint": f"kind=max_requests,count={REQUESTS}",
        "output": f"kind=json,path={tmp_path / 'report.json'}",
    }
    command = [str(Path(sys.executable).with_name("guidellm")), "run", "--disable-console"]
    command += [part for name, value in options.items() for part in (f"--{name}", value)]
    offline = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | offline, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (benchmark,) = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert (requests["errored"], requests["incomplete"]) == ([], []) and len(requests["successful"]) == REQUESTS
    for request in requests["successful"]:
        assert json.loads(request["request_args"])["body"]["stream_options"]["continuous_usage_stats"] is True
        assert (request["prompt_tokens"], request["output_tokens"]) == (PROMPT_TOKENS, OUTPUT_TOKENS)
        assert request["output"] and request["time_to_first_token_ms"] > 0
    assert answered(tiny_server, "/health") > health


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


async def measure(session: aiohttp.ClientSession, url: str, body: dict[str, Any], number: int) -> Measured:
    measured = Measured()
    headers = {"Authorization": "Bearer any", "x-request-id": f"bench-{number}"}
    async with session.post(f"{url}/v1/completions", json=body, headers=headers) as response:
        assert response.status == 200, await response.text()
        assert response.headers["x-request-id"] == f"bench-{number}"
        async for part in response.content.iter_any():
            measured.take(part)
    return measured


VLLM: dict[str, Any] = {
    "model": "tiny",
    "prompt": "def f(héllo",
    "repetition_penalty": 1.0,
    "max_tokens": OUTPUT_TOKENS,
    "logprobs": None,
    "stream": True,
    "stream_options": {"include_usage": True},
    "ignore_eos": True,
    # Given by its --temperature and --seed.
    "temperature": 0.0,
    "seed": 0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "sampling flags": {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "frequency_penalty": 0.0, "presence_penalty": 0.0},
    "log-probabilities": {"logprobs": 1},
    "ids": {"prompt": [1, *(byte + 4 for byte in VLLM["prompt"].encode())]},
}


@pytest.mark.parametrize("variant", VARIANTS)
async def test_requests_of_vllm_bench_are_answered(tiny_server: str, variant: str) -> None:
    body = VLLM | VARIANTS[variant]
    whole = {name: value for name, value in body.items() if name not in ("stream", "stream_options")}
    async with aiohttp.ClientSession() as session:
        several = await asyncio.gather(*(measure(session, tiny_server, body, number) for number in range(REQUESTS)))
        async with session.post(f"{tiny_server}/v1/completions", json=whole) as response:
            expected = await response.json()
    for measured in several:
        assert measured.ended and measured.pending == b"" and measured.arrivals
        assert measured.text == expected["choices"][0]["text"]
        assert measured.prompt_tokens == expected["usage"]["prompt_tokens"] == 13
        assert measured.completion_tokens == OUTPUT_TOKENS


async def test_vllm_bench_finds_the_model(tiny_server: str) -> None:
    """Without --model it takes the first that is listed: `id` to ask for, `root` to name the tokenizer by."""
    async with aiohttp.ClientSession() as session, session.get(f"{tiny_server}/v1/models") as response:
        first = (await response.json())["data"][0]
    assert first["id"] == "tiny" and first["root"] == "tiny"
