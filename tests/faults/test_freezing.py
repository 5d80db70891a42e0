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
    serving,
    talking,
    undisturbed,
    until_ready,
)

TIMEOUT = 2.0


@pytest.mark.faults
@pytest.mark.parametrize("streams", [0, 24], ids=["idle", "busy"])
async def test_a_frozen_engine_is_unready_and_replaced(tmp_path: Path, record_property: Record, streams: int) -> None:
    requests = mixed(24, seed=11)
    with serving(tmp_path) as server:
        async with talking(server) as http:
            expected = await undisturbed(http, requests)
            answers = asyncio.gather(*(ask(http, fields) for fields in requests[:streams]))
            await asyncio.sleep(0.4)
            frozen = time.monotonic()
            pid = send(engine_of(server), signal.SIGSTOP)
            late, unready = await asyncio.gather(lateness(http), until_ready(http, False, UNREADY_BEATS + 1 + LATE))
            assert late < LATE
            await new_engine(server, pid)
            replaced = time.monotonic() - frozen
            assert replaced < FROZEN_BEATS + 1 + LATE
            check(requests[:streams], await answers, expected[:streams])
            check(requests, await ask_all(http, requests), expected)
    record_property("figure", f"unready after {unready:.1f} s, {late:.2f} s late, replaced after {replaced:.1f} s")


@pytest.mark.faults
@pytest.mark.parametrize("limit", [None, 15], ids=["beats", "loading-seconds"])
async def test_an_engine_that_freezes_while_it_loads_is_replaced(
    tmp_path: Path, record_property: Record, limit: int | None
) -> None:
    requests = mixed(12, seed=12)
    flags = ["--loading-seconds", str(limit)] if limit else []
    with serving(tmp_path, *flags) as server:
        async with talking(server) as http:
            expected = await undisturbed(http, requests)
            answers = asyncio.gather(*(ask(http, fields) for fields in requests))
            await asyncio.sleep(0.3)
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
            check(requests, await answers, expected)
    record_property("figure", f"unready after {unready:.1f} s, {late:.2f} s late, replaced after {replaced:.1f} s")


@pytest.mark.faults
async def test_a_server_that_was_frozen_keeps_its_engine(tmp_path: Path) -> None:
    """As when the machine sleeps: the engine's heartbeat did not fail, though the server heard none for 13 s."""
    requests = mixed(16, seed=13)
    with serving(tmp_path) as server:
        engine = engine_of(server)
        async with talking(server) as http:
            expected = await undisturbed(http, requests)
            answers = asyncio.gather(*(ask(http, fields) for fields in requests))
            await asyncio.sleep(0.3)
            server.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(FROZEN_BEATS + 3)
            server.process.send_signal(signal.SIGCONT)
            check(requests, await answers, expected)
            await asyncio.sleep(UNREADY_BEATS)
            assert await is_ready(http)
        assert engine_of(server) == engine


async def lateness(http: httpx.AsyncClient) -> float:
    """Seconds by which a request outlives its deadline."""
    began = time.monotonic()
    answer = await ask(http, plain(1, 400, timeout=TIMEOUT, stream=False))
    assert answer.reasons == {"timeout"}
    return time.monotonic() - began - TIMEOUT
