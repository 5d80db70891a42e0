"""Clients that do not read, requests whose time ends before their turn, and answers too large for one piece."""

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import Message

from engine.config import BYTE_OFFSET
from engine.types import Delta, Event, Finished, Request, TokenLogprob, Usage
from server.admission import LOOKAHEAD
from server.app import create_app
from server.origin import Origin
from server.responses import to_json, to_json_in_turns
from server.schemas import Choice, Completion, CompletionUsage, Logprobs, Trace, TraceRound
from server.settings import ServerSettings
from tests.scripted_server import ScriptedClient, body, serving, until

ONE, TWO = "the-key-of-client-one", "the-key-of-client-two"
KEYS = (ONE.encode(), TWO.encode())


async def call(app: FastAPI, key: str, origin: Origin | None = None, send: Any = None, **fields: Any) -> bytes:
    """The body of an answer, whose messages go to `send`, too."""
    path, parts = "/v1/completions", list[bytes]()
    asked = [{"type": "http.request", "body": json.dumps(body(**fields)).encode(), "more_body": False}]
    headers = [(b"content-type", b"application/json"), (b"authorization", f"Bearer {key}".encode())]
    scope = {"type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": path}
    scope |= {"raw_path": path.encode(), "query_string": b"", "root_path": "", "client": ("127.0.0.1", 1)}
    scope |= {"server": ("127.0.0.1", 1), "asgi": {"version": "3.0", "spec_version": "2.3"}, "headers": headers}
    if origin:
        scope["state"] = {"origin": origin}

    async def receive() -> Message:
        if asked:
            return asked.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def take(message: Message) -> None:
        parts.append(message.get("body", b""))
        if send:
            await send(message)

    await app(scope, receive, take)
    return b"".join(parts)


async def test_a_client_that_does_not_read_keeps_no_turn_from_others() -> None:
    """All of its sequences have begun, also those that wait for the scores of their prompts."""
    client = ScriptedClient()
    app = create_app(ServerSettings(), client, KEYS)

    async def stuck(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    more = {"n": 20, "stream": True, "prompt_logprobs": 0}
    reading = asyncio.create_task(call(app, ONE, send=stuck, prompt=["x", "y"], **more))
    await until(lambda: len(client.requests) == 40 and app.state.gate.waiting == 0)
    assert LOOKAHEAD < 40
    answer = json.loads(await asyncio.wait_for(call(app, TWO, prompt="x"), 5))
    assert answer["choices"][0]["text"] == "ab"
    reading.cancel()
    await asyncio.wait({reading})
    app.state.grammars.close()


@pytest.mark.parametrize("more", [{}, {"best_of": 2}])
async def test_a_request_whose_time_ends_before_its_turn_keeps_what_it_had(more: dict[str, Any]) -> None:
    """Another server was lost while it held a byte back, which might have begun a stop string."""
    client = ScriptedClient()
    app = create_app(ServerSettings(), client, KEYS)
    crowd = asyncio.create_task(call(app, ONE, prompt="wait", n=LOOKAHEAD))
    await until(lambda: client.open == LOOKAHEAD)
    ids = [byte + BYTE_OFFSET for byte in b"hello\n"]
    entries = [TokenLogprob(i, -1.0, {}) for i in ids] if more else []
    held: dict[int, Sequence[Event]] = {0: [Delta(id="o", ids=ids, text=b"hello", logprobs=entries)]}
    origin = Origin(is_continued=True, held=held)
    answer = json.loads(await call(app, TWO, origin, prompt="x", timeout=0.2, stop=["\n\n"], **more))
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("hello\n", "timeout")
    assert answer["usage"]["completion_tokens"] == 6 and answer["usage"]["fastblt"]["queue_seconds"] >= 0.2
    client.release.set()
    await crowd
    app.state.grammars.close()


@pytest.mark.parametrize(("own", "ended"), [({}, ("length", "timeout")), ({"timeout": 5}, ("timeout", None))])
async def test_the_servers_own_timeout_ends_a_choice_by_length(
    own: dict[str, Any], ended: tuple[str, str | None]
) -> None:
    client = ScriptedClient()
    async with serving(client, default_timeout=3.0) as http:
        asked = body("late", **own)
        (choice,) = (await http.post("/v1/completions", json=asked)).json()["choices"]
        stream = await http.post("/v1/completions", json=asked | {"stream": True})
        sequences = (await http.get("/metrics")).text
    (last,) = json.loads(stream.text.split("\n")[0].removeprefix("data: "))["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == (last["finish_reason"], last["stop_reason"]) == ended
    assert [request.timeout for request in client.requests] == [own.get("timeout", 3.0)] * 2
    assert 'fastblt_sequences_total{decoder="blt",finish_reason="timeout"} 2.0' in sequences


class OneIsLate(ScriptedClient):
    """The first sample has no time for a byte."""

    async def submit(self, request: Request, told: Sequence[Delta] = ()) -> AsyncGenerator[Event, None]:
        if request.sample_index == 0:
            yield Finished(id=request.id, reason="timeout", usage=Usage(prompt_tokens=1))
            return
        entries = [TokenLogprob(101, -5.0 - request.sample_index, {})]
        yield Delta(id=request.id, ids=[101], text=b"a", logprobs=entries)
        usage = Usage(prompt_tokens=1, completion_tokens=1)
        last = -5.0 - request.sample_index
        yield Finished(id=request.id, reason="stop", usage=usage, cumulative_logprob=last)


async def test_a_sample_without_a_byte_is_never_the_best() -> None:
    async with serving(OneIsLate()) as http:
        (best,) = (await http.post("/v1/completions", json=body("x", best_of=3))).json()["choices"]
        assert (best["text"], best["finish_reason"]) == ("a", "stop")
        choices = (await http.post("/v1/completions", json=body("x", n=3, best_of=3))).json()["choices"]
        assert [choice["text"] for choice in choices] == ["", "a", "a"], "not ranked"


async def test_traces_count_towards_the_scores_of_an_answer_in_streams_too() -> None:
    async with serving(ScriptedClient(), max_scores=100) as http:

        async def refusal(**fields: Any) -> dict[str, Any]:
            answer: httpx.Response = await http.post("/v1/completions", json=body("x", **fields))
            error: dict[str, Any] = answer.json().get("error") or {}
            return error

        for stream in (True, False):
            error = await refusal(trace=True, n=2, max_tokens=60, stream=stream)
            assert (error["param"], error["code"]) == ("trace", "too_many_scores")
            why = "trace: max_tokens (60 bytes) times 2 samples make 120 ids; at most 100 are allowed"
            assert error["message"] == why
        assert not await refusal(trace=True, n=2, max_tokens=50)
        assert (await refusal(best_of=200))["param"] == "best_of"
        assert (await refusal(n=200))["param"] == "n"


async def test_a_long_answer_is_encoded_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.responses.TURN_SECONDS", 0)
    entries = [TokenLogprob(101, None, {}), *[TokenLogprob(101, -1.5, {102: -0.25, 104: -math.inf}, 3)] * 99]
    scores = {
        "tokens": ["a", '"top_logprobs":[]'] * 50,
        "token_logprobs": [None, math.nan] * 50,
        "top_logprobs": entries,
        "text_offset": list(range(100)),
    }
    large: list[dict[str, Any]] = [
        {"logprobs": Logprobs(**scores), "prompt_logprobs": entries},
        {"token_ids": [5] * 100, "prompt_token_ids": [6] * 100},
        {"trace": Trace(rounds=[TraceRound(ids=[101], drafts=[], accepted=0, passes=[])] * 100)},
        {},
    ]
    usage = CompletionUsage(prompt_tokens=1, completion_tokens=1, total_tokens=2)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    other = asyncio.create_task(others())
    for fields in ([large[0]], large, [large[3]] * 100):
        choices = [
            Choice(index=index, finish_reason="stop", **{"text": '"logprobs":[]', "logprobs": None, **field})
            for index, field in enumerate(fields)
        ]
        completion = Completion(id="x", created=0, model="m", choices=choices, usage=usage)
        before = turns
        assert await to_json_in_turns(completion) == to_json(completion)
        assert turns > before + 3
    other.cancel()
