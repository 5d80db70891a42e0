"""What an operator may do to a running server, with a key of its own."""

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.memory.prefix import BLOCK
from server import salt
from server.admission import LOOKAHEAD
from server.app import create_app
from server.settings import ServerSettings
from tests.scripted_server import ScriptedClient, body, listening, settled
from tests.serving import RunningServer, StartServer

API, OTHER, ADMIN = "the-key-of-a-client", "the-key-of-another", "the-key-of-the-operator"
ROUTES = [
    ("GET", "/admin/requests"),
    ("POST", "/admin/requests/cmpl-1/end"),
    ("POST", "/admin/drain"),
    ("POST", "/admin/resume"),
    ("POST", "/admin/prefix-cache/forget"),
    ("POST", "/admin/log-level/info"),
]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key else {}


@asynccontextmanager
async def serving(
    client: ScriptedClient, keys: tuple[str, ...] = (API,), admin: str = ADMIN, **settings: Any
) -> AsyncIterator[httpx.AsyncClient]:
    chosen = ServerSettings(**settings)
    admin_keys = (admin.encode(),) if admin else ()
    app = create_app(chosen, client, tuple(key.encode() for key in keys), None, admin_keys)
    async with listening(app, chosen) as port:
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
                yield http
        finally:
            client.release.set()


@pytest.mark.parametrize("keys", [(API,), ()], ids=["keys", "open"])
async def test_the_routes_need_the_admin_key_and_open_nothing_else(keys: tuple[str, ...], levels: None) -> None:
    async with serving(ScriptedClient(), keys) as http:
        for method, path in ROUTES:
            for key in ("", API, ADMIN[:-1], ADMIN + "x", "x" * 20):
                refused = await http.request(method, path, headers=bearer(key))
                error = refused.json()["error"]
                assert (refused.status_code, error["code"]) == (401, "invalid_api_key"), (path, key)
                assert error["message"] == (
                    "the admin key is not valid" if key else "send an admin key as 'Authorization: Bearer KEY'"
                )
                assert refused.headers["www-authenticate"] == "Bearer"
            assert (await http.request(method, path, headers={"authorization": f"Basic {ADMIN}"})).status_code == 401
            wanted = 404 if "cmpl-1" in path else 200
            assert (await http.request(method, path, headers=bearer(ADMIN))).status_code == wanted
        # An unknown route under /admin tells nothing to others, either.
        assert (await http.post("/admin/nope", headers=bearer(API))).status_code == 401
        assert (await http.post("/admin/nope", headers=bearer(ADMIN))).status_code == 404
        answers = [await http.get("/v1/models", headers=bearer(key)) for key in (API, ADMIN)]
        assert [answer.status_code for answer in answers] == [200, 401 if keys else 200]
        schema = (await http.get("/openapi.json", headers=bearer(API))).json()
        assert not [path for path in schema["paths"] if "admin" in path]


async def test_without_an_admin_key_there_are_no_such_routes() -> None:
    async with serving(ScriptedClient(), admin="") as http:
        for method, path in ROUTES:
            assert (await http.request(method, path, headers=bearer(API))).json()["error"]["code"] == "unknown_url"
            assert (await http.request(method, path, headers=bearer(ADMIN))).status_code == 401


async def test_a_key_that_is_listed_twice_opens_both() -> None:
    async with serving(ScriptedClient(), (API, ADMIN)) as http:
        assert (await http.get("/v1/models", headers=bearer(ADMIN))).status_code == 200
        assert (await http.get("/admin/requests", headers=bearer(ADMIN))).status_code == 200


async def listed(http: httpx.AsyncClient) -> list[dict[str, Any]]:
    answer = await http.get("/admin/requests", headers=bearer(ADMIN))
    assert answer.status_code == 200
    found: list[dict[str, Any]] = answer.json()["requests"]
    return found


async def test_a_request_is_ended_by_either_id() -> None:
    client = ScriptedClient()
    async with serving(client) as http:

        def ask(name: str) -> asyncio.Task[httpx.Response]:
            headers = bearer(API) | {"x-request-id": name}
            return asyncio.create_task(http.post("/v1/completions", json=body("wait", n=2), headers=headers))

        one, two, three = ask("one"), ask("two"), ask("two")
        await settled(client, 6)
        by_name = {entry["request_id"]: entry for entry in await listed(http)}
        assert by_name.keys() == {"one", "two"} and by_name["one"]["id"].startswith("cmpl-")
        assert by_name["one"]["prompt_bytes"] == 5 and by_name["one"]["completion_bytes"] == 0
        assert 0 < by_name["one"]["seconds"] < 20
        ended = await http.post(f"/admin/requests/{by_name['one']['id']}/end", headers=bearer(ADMIN))
        assert ended.json() == {"ended": [by_name["one"]["id"]]}
        error = (await one).json()["error"]
        assert (await one).status_code == 403 and error["type"] == "permission_error"
        assert (error["code"], error["message"]) == (
            "ended_by_operator",
            "the operator of this server ended the request",
        )
        await settled(client, 4)
        ended = await http.post("/admin/requests/two/end", headers=bearer(ADMIN))
        assert len(ended.json()["ended"]) == 2
        assert [(await task).status_code for task in (two, three)] == [403, 403]
        await settled(client, 0)
        assert await listed(http) == []
        missing = await http.post("/admin/requests/two/end", headers=bearer(ADMIN))
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "request_not_found")
        exposed = (await http.get("/metrics")).text
        assert 'fastblt_rejections_total{reason="ended_by_operator"} 3.0' in exposed
        assert 'fastblt_sequences_total{decoder="blt",finish_reason="abort"} 6.0' in exposed
        assert "\nfastblt_queued_sequences 0.0\n" in exposed


async def test_a_stream_is_ended_with_an_event_and_a_request_that_waits_for_its_turn_at_once() -> None:
    client = ScriptedClient()
    async with serving(client, (API, OTHER)) as http:
        first = asyncio.create_task(http.post("/v1/completions", json=body("wait", n=LOOKAHEAD), headers=bearer(API)))
        await settled(client, LOOKAHEAD)
        waits = asyncio.create_task(http.post("/v1/completions", json=body("x"), headers=bearer(OTHER)))
        while len(found := await listed(http)) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await http.post(f"/admin/requests/{found[1]['id']}/end", headers=bearer(ADMIN))
        assert (await waits).status_code == 403
        client.release.set()
        assert (await first).status_code == 200
        client.release.clear()
        asked = body("pause", stream=True, max_tokens=9)
        async with http.stream("POST", "/v1/completions", json=asked, headers=bearer(API)) as stream:
            lines = stream.aiter_lines()
            assert '"text":"a"' in await anext(lines)
            (found,) = [await listed(http)]
            assert found[0]["completion_bytes"] == 1
            await http.post(f"/admin/requests/{found[0]['id']}/end", headers=bearer(ADMIN))
            *_, last, done = [line async for line in lines if line]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "ended_by_operator"
        assert done == "data: [DONE]"
        await settled(client, 0)


async def test_a_stream_that_is_not_read_is_ended_in_the_engine_at_once() -> None:
    client = ScriptedClient()
    async with serving(client, max_scores=1 << 22) as http:
        asked = body("flood", stream=True, max_tokens=900, echo=True)
        async with http.stream("POST", "/v1/completions", json=asked, headers=bearer(API)):
            await settled(client, 1)
            (found,) = await listed(http)
            ended = await http.post(f"/admin/requests/{found['id']}/end", headers=bearer(ADMIN))
            assert ended.is_success
            await settled(client, 0)


async def test_a_drain_refuses_new_requests_and_can_be_ended() -> None:
    client = ScriptedClient()
    async with serving(client) as http:
        running = asyncio.create_task(http.post("/v1/completions", json=body("wait"), headers=bearer(API)))
        await settled(client, 1)
        for _ in range(2):
            answer = await http.post("/admin/drain", headers=bearer(ADMIN))
            assert answer.json() == {"draining": True, "requests": 1}
        refused = await http.post("/v1/completions", json=body("x"), headers=bearer(API))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert refused.json()["error"]["message"] == "the server takes no new requests for now"
        # A client that keeps its connections would go on asking a server that goes.
        assert refused.headers["connection"] == "close" and int(refused.headers["retry-after"]) > 0
        ports = set()
        for _ in range(2):
            async with http.stream("POST", "/v1/completions", json=body("x"), headers=bearer(API)) as again:
                ports.add(again.extensions["network_stream"].get_extra_info("client_addr")[1])
                await again.aread()
        assert len(ports) == 2
        ready = [(await http.get(f"/health/{name}")).status_code for name in ("ready", "live")]
        assert ready == [503, 200]
        assert "\nfastblt_draining 1.0\n" in (await http.get("/metrics")).text
        client.release.set()
        assert (await running).status_code == 200
        assert (await http.post("/admin/resume", headers=bearer(ADMIN))).json() == {"draining": False, "requests": 0}
        assert (await http.get("/health/ready")).status_code == 200
        assert (await http.post("/v1/completions", json=body("x"), headers=bearer(API))).status_code == 200


async def test_a_shutdown_is_not_resumed() -> None:
    client, chosen = ScriptedClient(), ServerSettings()
    app = create_app(chosen, client, (), None, (ADMIN.encode(),))
    async with listening(app, chosen) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        await http.post("/admin/drain", headers=bearer(ADMIN))
        app.state.gate.drain(for_good=True)
        refused = await http.post("/admin/resume", headers=bearer(ADMIN))
        assert (refused.status_code, refused.json()["error"]["message"]) == (503, "the server is shutting down")
        assert app.state.gate.draining


@pytest.mark.parametrize("level", ["loud", "INFO", "critical"])
async def test_an_unknown_log_level_is_refused(level: str) -> None:
    before = logging.getLogger("fastblt").level
    async with serving(ScriptedClient()) as http:
        refused = await http.post(f"/admin/log-level/{level}", headers=bearer(ADMIN))
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (400, "invalid_value", "level")
    assert error["message"] == f"level: must be one of debug, info, warning, error, not {level!r}"
    assert logging.getLogger("fastblt").level == before


@pytest.mark.parametrize("fields", [{}, {"cache_salt": "x"}])
@pytest.mark.parametrize("key", [b"", b"digest"])
def test_all_salts_change_when_the_prefix_cache_is_forgotten(key: bytes, fields: dict[str, str]) -> None:
    given = fields.get("cache_salt")
    before = salt.salt_of(key, given)
    assert salt.salt_of(key, given) == before
    salt.forget()
    assert salt.salt_of(key, given) != before
    assert salt.salt_of(key, given) == salt.salt_of(key, given)


def test_a_real_server_obeys_its_operator(start_server: StartServer, tmp_path: Path) -> None:
    keys = tmp_path / "admin"
    keys.write_text(f"# Ours\n{ADMIN}\n")
    running = start_server("--admin-key-file", str(keys))
    with running.client() as http, running.client(headers=bearer(ADMIN)) as admin:
        prompt = "to be forgotten " * BLOCK

        def cached() -> int:
            asked = {"prompt": prompt, "max_tokens": 1, "ignore_eos": True}
            usage = http.post("/v1/completions", json=asked).json()["usage"]
            return int(usage["prompt_tokens_details"]["cached_tokens"])

        assert cached() == 0 and cached() > 0
        assert admin.post("/admin/prefix-cache/forget").json() == {"forgotten": True}
        assert cached() == 0 and cached() > 0

        end(running, http, admin, "quiet")
        assert "aborted after" not in running.log.read_text()
        assert admin.post("/admin/log-level/debug").json() == {"level": "debug"}
        end(running, http, admin, "loud")
        until_logged(running, "aborted after")
        assert admin.post("/admin/log-level/error").status_code == 200
        before = running.log.read_text()
        end(running, http, admin, "silent")
        assert ADMIN not in before and "the operator ended cmpl-" in before
        assert len(running.log.read_text().splitlines()) <= len(before.splitlines()) + 1

        keys.write_text("another-key-of-the-operator")
        os.utime(keys, (1, 1))
        deadline = time.monotonic() + 5
        while admin.get("/admin/requests").status_code != 401:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def end(running: RunningServer, http: httpx.Client, admin: httpx.Client, name: str) -> None:
    """Ends a stream; the engine's other lines about it have had time to come."""
    asked = {"prompt": "a", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with http.stream("POST", "/v1/completions", json=asked, headers={"x-request-id": name}) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert len(admin.post(f"/admin/requests/{name}/end").json()["ended"]) == 1
        assert '"ended_by_operator"' in "".join(lines)
    while running.pages_in_use():
        time.sleep(0.02)


def until_logged(running: RunningServer, text: str) -> None:
    deadline = time.monotonic() + 5
    while text not in running.log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
