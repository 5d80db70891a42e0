"""The engine's process freezes (SIGSTOP): it is noticed, deadlines hold, and another one takes over."""

import asyncio
import signal
import time
from pathlib import Path

import httpx
import pytest

from engine.process.client import FROZEN_BEATS, FROZEN_LOADING_BEATS, UNREADY_BEATS
from tests.faults.asking import (
    LATE,
    Record,
    ask,
    ask_all,
    check,
    engine_of,
    is_ready,
    kill,
    mixed,
    new_engine,
    plain,
    send,
    under_way,
    until_ready,
)

TIMEOUT = 2.0


@pytest.mark.faults
@pytest.mark.parametrize("count", [0, 24], ids=["idle", "busy"])
async def test_a_frozen_engine_is_unready_and_replaced(tmp_path: Path, record_property: Record, count: int) -> None:
    requests = mixed(24, seed=11)
    async with under_way(tmp_path, requests, count=count) as streams:
        server, http, expected = streams.server, streams.http, streams.expected
        frozen = time.monotonic()
        pid = send(engine_of(server), signal.SIGSTOP)
        late, unready = await asyncio.gather(lateness(http), until_ready(http, False, UNREADY_BEATS + 1 + LATE))
        assert late < LATE
        await new_engine(server, pid)
        replaced = time.monotonic() - frozen
        assert replaced < FROZEN_BEATS + 1 + LATE
        await streams.check()
        check(requests, await ask_all(http, requests), expected)
    record_property("figure", f"unready after {unready:.1f} s, {late:.2f} s late, replaced after {replaced:.1f} s")


@pytest.mark.faults
@pytest.mark.parametrize("limit", [None, 15], ids=["beats", "loading-seconds"])
async def test_an_engine_that_freezes_while_it_loads_is_replaced(
    tmp_path: Path, record_property: Record, limit: int | None
) -> None:
    requests = mixed(12, seed=12)
    flags = ["--loading-seconds", str(limit)] if limit else []
    async with under_way(tmp_path, requests, *flags) as streams:
        server, http = streams.server, streams.http
        pid = await new_engine(server, kill(server))
        await asyncio.sleep(0.5)
        frozen = time.monotonic()
        send(pid, signal.SIGSTOP)
        unready = await until_ready(http, False, LATE)
        late = await lateness(http)
        assert late < LATE
        await new_engine(server, pid)
        replaced = time.monotonic() - frozen
        assert replaced < (limit or FROZEN_LOADING_BEATS) + 1 + LATE
        await streams.check()
    record_property("figure", f"unready after {unready:.1f} s, {late:.2f} s late, replaced after {replaced:.1f} s")


@pytest.mark.faults
async def test_a_server_that_was_frozen_keeps_its_engine(tmp_path: Path) -> None:
    """As when the machine sleeps: the engine's heartbeat did not fail, though the server heard none for 13 s."""
    requests = mixed(16, seed=13)
    async with under_way(tmp_path, requests) as streams:
        server, http = streams.server, streams.http
        engine = engine_of(server)
        server.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(FROZEN_BEATS + 3)
        server.process.send_signal(signal.SIGCONT)
        await streams.check()
        await asyncio.sleep(UNREADY_BEATS)
        assert await is_ready(http)
        assert engine_of(server) == engine


async def lateness(http: httpx.AsyncClient) -> float:
    """Seconds by which a request outlives its deadline."""
    began = time.monotonic()
    answer = await ask(http, plain(1, 400, timeout=TIMEOUT, stream=False))
    assert answer.reasons == {"timeout"}
    return time.monotonic() - began - TIMEOUT
