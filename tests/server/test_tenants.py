"""Limits of API keys, and fairness between them, over HTTP."""

import asyncio
from typing import Any

import httpx
import pytest

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
