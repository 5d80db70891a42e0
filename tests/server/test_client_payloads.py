"""What programs send that people point at a server first, as they send it; tests/compat has the programs themselves."""

import json
import socket
from collections.abc import Callable
from http.client import HTTPResponse
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import pytest

from engine.config import BYTE_OFFSET
from tests.serving import RunningServer

MAX_TOKENS = 16
Body = dict[str, Any]


def ids(text: str) -> list[int]:
    return [byte + BYTE_OFFSET for byte in text.encode()]


def whole(server: RunningServer, body: Body) -> Body:
    """A response in one piece, for a body without `stream` or with false."""
    with server.client() as http:
        response = http.post("/v1/completions", json=body, headers={"authorization": "Bearer any"})
    assert response.status_code == 200, response.text
    answer: Body = response.json()
    prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(prompts) * body.get("n", 1)))
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    if body.get("ignore_eos"):
        assert usage["completion_tokens"] == body["max_tokens"]
    return answer


def stream(server: RunningServer, body: Body) -> None:
    """A response in chunks of one choice each. `stream_options` decides where `usage` is."""
    options = body.get("stream_options", {})
    with server.client() as http, http.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        # Else nginx keeps a stream until it is whole.
        assert response.headers["x-accel-buffering"] == "no" and response.headers["cache-control"] == "no-cache"
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    *events, end = [line.removeprefix("data: ") for line in lines]
    assert end == "[DONE]"
    chunks: list[Body] = [json.loads(event) for event in events]
    usages = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    for usage in usages:
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    if options.get("include_usage"):
        last = chunks.pop()
        assert last["choices"] == [] and last["usage"]["completion_tokens"] == body["max_tokens"]
    made = [usage["completion_tokens"] for usage in usages]
    if options.get("continuous_usage_stats"):
        assert len(made) == len(chunks) + 1 and all(before <= after for before, after in pairwise(made))
        assert len({usage["prompt_tokens"] for usage in usages}) == 1 and made[0] > 0
    else:
        assert len(made) == bool(options.get("include_usage"))
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert len(choices) == len(chunks) and choices[-1]["finish_reason"] in ("length", "stop")
    if body.get("ignore_eos"):
        assert "".join(choice["text"] for choice in choices)


def scores(server: RunningServer, body: Body) -> None:
    """lm-eval's reading: the entries of the continuation are those after the context, without what was generated."""
    answer = whole(server, body)
    ended = whole(server, body | {"logit_bias": {"2": 100}})
    for prompt, choice, stopped in zip(body["prompt"], answer["choices"], ended["choices"], strict=True):
        told = choice["logprobs"]
        assert len(told["token_logprobs"]) == len(told["top_logprobs"]) == len(prompt) + 1
        assert told["token_logprobs"][0] is None and all(score < 0 for score in told["token_logprobs"][1:-1])
        for top, score in zip(told["top_logprobs"][1:], told["token_logprobs"][1:], strict=True):
            assert max(top.values()) >= score
        # The same where the model ends the text at once.
        assert stopped["finish_reason"] == "stop" and stopped["logprobs"]["tokens"][-1] == "</s>"
        assert stopped["logprobs"]["token_logprobs"][1:-1] == pytest.approx(told["token_logprobs"][1:-1], abs=1e-5)


def jdk(server: RunningServer, body: Body, *, parted: bool = False) -> None:
    """The bytes of the JDK's HttpClient, which offers HTTP/2, twice on one connection. parted: the body comes late."""
    data = json.dumps(body).encode()
    lines = [
        "POST /v1/completions HTTP/1.1",
        "Connection: Upgrade, HTTP2-Settings",
        f"Content-Length: {len(data)}",
        f"Host: {urlsplit(server.url).netloc}",
        "HTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAAAAYABgAA",
        "Upgrade: h2c",
        "User-Agent: Java-http-client/17.0.15",
        "Content-Type: application/json",
    ]
    head = "\r\n".join([*lines, "", ""]).encode()
    with connected(server) as connection:
        for _ in range(2):
            for part in (head, data) if parted else (head + data,):
                connection.sendall(part)
            assert answered(connection)["usage"]["completion_tokens"] == body["max_tokens"]


def jdk_parted(server: RunningServer, body: Body) -> None:
    jdk(server, body, parted=True)


def half_closed(server: RunningServer, body: Body) -> None:
    """A client such as `nc -N`, that says with its request that it will say no more."""
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    with connected(server) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + data)
        connection.shutdown(socket.SHUT_WR)
        assert answered(connection)["usage"]["completion_tokens"] == body["max_tokens"]
        assert connection.recv(1) == b""


def connected(server: RunningServer) -> socket.socket:
    address = urlsplit(server.url)
    connection = socket.create_connection((address.hostname, address.port), timeout=20)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def answered(connection: socket.socket) -> Body:
    """The body of the one answer."""
    with HTTPResponse(connection) as response:
        response.begin()
        assert response.status == 200, response.read()
        answer: Body = json.loads(response.read())
    return answer


PLAIN: Body = {"model": "tiny", "prompt": "def f(", "max_tokens": MAX_TOKENS}
BYTES = PLAIN | {"ignore_eos": True}
USAGE: Body = {"stream": True, "stream_options": {"include_usage": True}}
LANGCHAIN: Body = {"frequency_penalty": 0, "logprobs": None, "presence_penalty": 0, "seed": None, "top_p": 1}
SCORED: Body = {"model": "tiny", "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}

CASES: dict[str, tuple[Callable[[RunningServer, Body], object], Body]] = {
    "vllm bench": (stream, BYTES | USAGE | {"repetition_penalty": 1.0, "logprobs": None}),
    "vllm bench, sampling flags": (
        stream,
        BYTES | USAGE | {"repetition_penalty": 1.0, "temperature": 0.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0},
    ),
    "guidellm": (
        stream,
        BYTES | {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ),
    "guidellm without a stream": (whole, BYTES),
    "sglang bench": (stream, BYTES | {"temperature": 0.0, "best_of": 1, "stream": True}),
    "sglang bench without a stream": (whole, BYTES | {"temperature": 0.0, "best_of": 1, "stream": False}),
    "inference-perf": (stream, BYTES | USAGE),
    "inference-perf without a stream": (whole, BYTES | {"stream": False}),
    "lm-eval, likelihood": (scores, SCORED | {"prompt": [ids("def f(x):"), [1, *ids("héllo")]]}),
    "lm-eval, generation": (
        whole,
        {
            "prompt": [ids("Question: é?\nAnswer:")],
            "model": "tiny",
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "stop": ["\n\n", "</s>"],
            "seed": 1234,
        },
    ),
    "LiteLLM": (whole, PLAIN | {"stream": False}),
    "LiteLLM, streamed": (stream, BYTES | USAGE),
    "LangChain": (whole, PLAIN | LANGCHAIN | {"prompt": ["def f("], "n": 1, "temperature": 0.7}),
    "LangChain, streamed": (stream, PLAIN | LANGCHAIN | {"n": 1, "temperature": 0.7, "stream": True}),
    "LangChain, several": (
        whole,
        PLAIN | LANGCHAIN | {"prompt": ["a", "b"], "n": 2, "best_of": 2, "stop": ["x"], "temperature": 0.0},
    ),
    "LangChain for vLLM": (
        whole,
        PLAIN | {"prompt": ["def f("], "frequency_penalty": 0.0, "logit_bias": None, "n": 1, "temperature": 0.7},
    ),
    "JDK": (jdk, BYTES),
    "JDK, body apart": (jdk_parted, BYTES),
    "half-closed": (half_closed, BYTES),
}


@pytest.mark.parametrize("case", CASES)
def test_payloads_of_known_clients_are_answered_as_those_clients_expect(server: RunningServer, case: str) -> None:
    read, body = CASES[case]
    read(server, body)
