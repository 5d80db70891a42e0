"""Limits of API keys, and fairness between them, over HTTP."""

import asyncio
from typing import Any

import httpx
import pytest

from server.admission import LOOKAHEAD
from server.errors import ApiError
from server.settings import ServerSettings
from server.tenants import BURST_SECONDS, Tenant
from tests.scripted_server import ScriptedClient, body, serving, settled

ONE, TWO = "the-key-of-client-one", "the-key-of-client-two"
KEYS = (ONE.encode(), TWO.encode())


async def ask(http: httpx.AsyncClient, key: str, prompt: Any, **fields: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return await http.post("/v1/completions", json=body(prompt, **fields), headers=headers)


def refusal(response: httpx.Response) -> tuple[str, str]:
    error = response.json()["error"]
    assert response.status_code == 429 and error["type"] == "rate_limit_error"
    return error["code"], error["message"]


@pytest.mark.parametrize("keys", [KEYS, ()], ids=["keys", "open"])
async def test_requests_at_once_are_limited_for_each_key(keys: tuple[bytes, ...]) -> None:
    client = ScriptedClient()
    async with serving(client, keys, max_requests_per_key=2, retry_after=7) as http:
        first = [asyncio.create_task(ask(http, ONE if keys else "", "wait", n=2)) for _ in range(2)]
        await settled(client, 4)
        refused = await ask(http, ONE if keys else "", "x")
        who = "this API key has" if keys else "the clients of this server have"
        message = f"{who} 2 requests at once, of at most 2 (max_requests_per_key); try again in 7 s"
        assert refusal(refused) == ("too_many_requests", message)
        assert refused.headers["retry-after"] == "7"
        if keys:
            assert (await ask(http, TWO, "x")).status_code == 200
        client.release.set()
        assert [answer.status_code for answer in await asyncio.gather(*first)] == [200, 200]
        assert (await ask(http, ONE if keys else "", "x")).status_code == 200
        exposed = (await http.get("/metrics")).text
        assert 'fastblt_rejections_total{reason="too_many_requests"} 1.0' in exposed
        assert ONE not in exposed


async def test_a_request_whose_client_leaves_no_longer_counts() -> None:
    client = ScriptedClient()
    async with serving(client, KEYS, max_requests_per_key=1, max_queued_bytes_per_key=8) as http:
        first = asyncio.create_task(ask(http, ONE, "wait"))
        await settled(client, 1)
        first.cancel()
        await settled(client, 0)
        assert (await ask(http, ONE, "a longer prompt")).status_code == 200


async def test_waiting_bytes_of_prompts_are_limited_for_each_key() -> None:
    client = ScriptedClient()
    async with serving(client, KEYS, max_queued_bytes_per_key=12) as http:
        # Alone any prompt passes. It counts once, whatever the number of its samples, until each has begun.
        first = asyncio.create_task(ask(http, ONE, ["pause", "wait"], n=2, add_special_tokens=False))
        await settled(client, 4)
        code, message = refusal(await ask(http, ONE, "four", add_special_tokens=False))
        assert code == "too_many_queued_bytes"
        assert "this API key has 9 bytes of prompts waiting; 4 more would exceed 12" in message
        assert (await ask(http, ONE, "two", add_special_tokens=False)).status_code == 200
        assert (await ask(http, TWO, "four", add_special_tokens=False)).status_code == 200
        client.release.set()
        assert (await first).status_code == 200
        first = asyncio.create_task(ask(http, ONE, "pause", stream=True, max_tokens=2))
        assert (await ask(http, ONE, "a longer prompt")).status_code == 200
        await first


async def test_generated_bytes_are_limited_for_each_key() -> None:
    async with serving(ScriptedClient(), KEYS, max_bytes_per_second_per_key=500) as http:
        # Three pieces of 2,048 bytes: 1,144 more than 10 seconds allow.
        assert (await ask(http, ONE, "flood", max_tokens=3)).status_code == 200
        refused = await ask(http, ONE, "x")
        code, message = refusal(refused)
        assert code == "rate_limit_exceeded"
        limit = "all bytes that 500 a second allow (max_bytes_per_second_per_key)"
        assert message == f"this API key has generated {limit}; try again in 3 s"
        assert refused.headers["retry-after"] == "3"
        assert (await ask(http, TWO, "x")).status_code == 200


def test_the_rate_holds_on_average_and_a_pause_gives_a_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("server.tenants.time.monotonic", lambda: now)
    tenant = Tenant(b"key", ServerSettings(max_bytes_per_second_per_key=100))
    generated = 0
    for _ in range(10_000):
        now += 0.1
        try:
            tenant.check()
        except ApiError:
            continue
        generated += 37
        tenant.generated(37)
    assert 100 * now <= generated <= 100 * (now + BURST_SECONDS) + 37
    assert not tenant.is_idle
    now += BURST_SECONDS + 1
    assert tenant.is_idle


def crowd(http: httpx.AsyncClient, count: int, **fields: Any) -> list[asyncio.Task[httpx.Response]]:
    """Requests of the first key that the engine does not answer yet."""
    return [asyncio.create_task(ask(http, ONE, "wait", **fields)) for _ in range(count)]


async def test_another_key_has_its_turn_before_a_crowd_and_takes_its_place_in_a_full_queue() -> None:
    client = ScriptedClient()
    async with serving(client, KEYS, max_queue=40, max_choices=8) as http:
        tasks = crowd(http, 40)
        await until_metric(http, "fastblt_queued_sequences", 40)
        assert len(client.requests) == LOOKAHEAD
        # Autoscalers see those that the engine does not have yet.
        await until_metric(http, "fastblt_waiting_sequences", 40 - LOOKAHEAD)
        other = asyncio.create_task(ask(http, TWO, "x"))
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        (evicted,) = done
        code, message = refusal(evicted.result())
        assert code == "queue_full" and "gave way to one of another key" in message
        # The crowd itself has no more room.
        assert refusal(await ask(http, ONE, "x"))[0] == "queue_full"
        client.release.set()
        assert (await other).status_code == 200
        assert sorted(answer.status_code for answer in await asyncio.gather(*tasks)) == [200] * 39 + [429]
        asked = [len(request.prompt_ids) for request in client.requests]
        assert len(asked) == 40 and asked.index(2) <= LOOKAHEAD + 1
        await until_metric(http, "fastblt_queued_sequences", 0)


async def until_metric(http: httpx.AsyncClient, name: str, value: float) -> None:
    async with asyncio.timeout(5):
        while f"\n{name} {float(value)}\n" not in (await http.get("/metrics")).text:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_request_that_waits_for_its_turn_keeps_its_stream_its_time_and_its_right_to_leave() -> None:
    client = ScriptedClient()
    async with serving(client, KEYS, keepalive_seconds=0.05) as http:
        tasks = crowd(http, 1, n=LOOKAHEAD)
        await settled(client, LOOKAHEAD)
        late = (await ask(http, TWO, ["x", "y"], n=2, timeout=0.2, echo=True, logprobs=0)).json()
        assert [choice["finish_reason"] for choice in late["choices"]] == ["timeout"] * 4
        assert 0.2 <= late["usage"]["fastblt"]["queue_seconds"] < 5
        gone = asyncio.create_task(ask(http, TWO, "x"))
        headers = {"authorization": f"Bearer {TWO}"}
        async with http.stream("POST", "/v1/completions", json=body("x", stream=True), headers=headers) as stream:
            lines = stream.aiter_lines()
            assert await anext(lines) == ""
            gone.cancel()
            await until_metric(http, "fastblt_queued_sequences", LOOKAHEAD + 1)
            assert len(client.requests) == LOOKAHEAD
            client.release.set()
            text = "".join([line async for line in lines])
        assert text.endswith("data: [DONE]") and '"text":"a"' in text
        assert (await tasks[0]).status_code == 200
        assert len(client.requests) == LOOKAHEAD + 1


async def test_time_in_line_is_taken_from_the_requests_own() -> None:
    client = ScriptedClient()
    async with serving(client, KEYS) as http:
        tasks = crowd(http, 1, n=LOOKAHEAD)
        await settled(client, LOOKAHEAD)
        late = asyncio.create_task(ask(http, TWO, "x", timeout=30))
        await until_metric(http, "fastblt_queued_sequences", LOOKAHEAD + 1)
        client.release.set()
        usage = (await late).json()["usage"]["fastblt"]
        given = client.requests[-1].timeout
        assert given is not None and 0 < 30 - given < 20
        assert usage["queue_seconds"] == pytest.approx(30 - given, abs=1e-5)
        await asyncio.gather(*tasks)


async def test_the_priority_of_a_body_orders_the_line_of_its_key() -> None:
    client = ScriptedClient()
    async with serving(client, KEYS) as http:
        tasks = crowd(http, 1, n=LOOKAHEAD)
        await settled(client, LOOKAHEAD)
        for number, priority in enumerate((5, -3), 1):
            tasks.append(asyncio.create_task(ask(http, ONE, "x", priority=priority)))
            await until_metric(http, "fastblt_queued_sequences", LOOKAHEAD + number)
        client.release.set()
        await asyncio.gather(*tasks)
    assert [request.priority for request in client.requests[LOOKAHEAD:]] == [-3, 5]
