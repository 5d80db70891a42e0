"""Clients come in crowds and vanish at every moment; those who stay get what they asked for, in time."""

import asyncio
import socket
import struct
import time
from pathlib import Path
from random import Random

import httpx
import pytest

from tests.faults.asking import (
    LATE,
    Fields,
    Record,
    ask,
    ask_all,
    check,
    mixed,
    plain,
    serving,
    talking,
    undisturbed,
    until,
)
from tests.raw_http import connected, post
from tests.serving import RunningServer

CONNECTIONS, VANISH = 1000, 900
QUEUED, RUNNING = 1000, 8
DEADLINES = 200


@pytest.mark.faults
async def test_those_who_stay_are_served_while_900_of_1000_vanish(tmp_path: Path, record_property: Record) -> None:
    requests, random = mixed(CONNECTIONS - VANISH, seed=51, most=60), Random(52)
    flags = ("--max-connections-per-address", "2000", "--max-queue", "4000")
    with serving(tmp_path, *flags) as server:
        async with talking(server) as http:
            expected = await undisturbed(http, requests)
            leaving = asyncio.gather(*(vanish(server, random, number) for number in range(VANISH)))
            answers = asyncio.gather(*(ask(http, fields) for fields in requests))
            check(requests, await answers, expected)
            await leaving
            await until(lambda: not sequences(server, "running") + sequences(server, "waiting"), 10 + LATE)
            aborted = server.aborted()
            check(requests, await ask_all(http, requests), expected)
    assert aborted > 0
    record_property(
        "figure", f"{VANISH} of {CONNECTIONS} vanished, {aborted:.0f} sequences ended for it; the rest right"
    )


def sequences(server: RunningServer, which: str) -> float:
    (value,) = server.metrics(f"fastblt_{which}_sequences").values()
    return value


async def vanish(server: RunningServer, random: Random, number: int) -> None:
    """Leaves at any moment of a request, politely or with a reset."""
    port = httpx.URL(server.url).port
    assert port
    data = post(plain(number, random.randrange(1, 2000), n=random.choice([1, 1, 4])))
    sent = random.choice([0, random.randrange(len(data)), len(data), len(data), len(data)])
    await asyncio.sleep(random.uniform(0, 2))
    try:
        async with connected(port) as raw:
            if random.random() < 0.5:
                raw.writer.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
            await raw.send(data[:sent])
            await asyncio.sleep(random.uniform(0, 3))
            if random.random() < 0.5 and sent == len(data):
                async with asyncio.timeout(5):
                    await raw.reader.read(random.randrange(1, 20_000))
    except (OSError, TimeoutError):
        pass


@pytest.mark.faults
async def test_many_queue_for_few(tmp_path: Path, record_property: Record) -> None:
    """1,000 requests for 8 places all complete; with a full queue more are refused at once."""
    requests = [plain(number, 16, temperature=0.7) for number in range(QUEUED)]
    flags = ("--max-connections-per-address", "4000", "--max-queue", str(QUEUED), "--max-sequences", str(RUNNING))
    with serving(tmp_path, *flags) as server:
        async with talking(server) as http:
            few = requests[:: QUEUED // 20]
            expected = await undisturbed(http, few)
            began = time.monotonic()
            answers = asyncio.gather(*(ask(http, fields) for fields in requests))
            await until(lambda: sequences(server, "waiting") >= QUEUED // 2)
            found = await answers
            seconds = time.monotonic() - began
            assert {answer.status for answer in found} == {200}
            check(few, found[:: QUEUED // 20], expected)
    record_property("figure", f"{QUEUED} queued for {RUNNING} places: all answered within {seconds:.1f} s")


@pytest.mark.faults
async def test_deadlines_hold_under_load(tmp_path: Path, record_property: Record) -> None:
    """200 requests with deadlines between 0.3 and 3 s, more than the server can finish."""
    random = Random(53)
    with serving(tmp_path) as server:
        fields = [plain(n, 4000, timeout=random.uniform(0.3, 3), stream=False) for n in range(DEADLINES)]
        asked = (lateness(server, random.uniform(0, 3), each) for each in fields)
        late = sorted(await asyncio.gather(*asked))
    assert late[0] > -0.05
    assert late[-1] < LATE
    middle = late[DEADLINES // 2]
    record_property("figure", f"{DEADLINES} deadlines: {middle:.2f} s late in the middle, {late[-1]:.2f} s at most")


async def lateness(server: RunningServer, pause: float, fields: Fields) -> float:
    """Seconds from the deadline, by a client that does little else, until the whole answer is there."""
    port = httpx.URL(server.url).port
    assert port
    async with connected(port) as raw:
        await asyncio.sleep(pause)
        began = time.monotonic()
        await raw.send(post(fields))
        answer = await raw.answer(b"POST")
        took = time.monotonic() - began
    assert answer.status == 200, answer.body
    assert answer.json()["choices"][0]["finish_reason"] == "timeout"
    return took - float(fields["timeout"])
