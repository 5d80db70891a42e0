"""Clients come in crowds and vanish at every moment; those who stay get what they asked for, in time."""

import asyncio
import json
import resource
import signal
import socket
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import httpx
import pytest

from engine.process.heartbeat import BEAT_SECONDS
from tests.faults.asking import (
    LATE,
    WAIT,
    Answer,
    Fields,
    Record,
    ask,
    ask_all,
    check,
    engine_of,
    mixed,
    plain,
    private_bytes,
    send,
    serving,
    talking,
    undisturbed,
    until,
)
from tests.raw_http import connected, post
from tests.serving import RunningServer

CONNECTIONS, VANISH = 1000, 900
QUEUED, RUNNING = 1000, 8
MANY, PLACES, KINDS = 10_000, 256, 50
STOPPED = 6.0
"""Seconds for which the engine is stopped: less than makes it look frozen."""
POOL = 512 << 20
"""Bytes of caches, in which all places fit."""
MOST_EACH = 64 << 10
"""Bytes of private memory of each process for one that waits."""
DEADLINES = 200
LATE_MIDDLE, LATE_MOST = 0.2, 1.0
"""Seconds after a deadline, on a machine that may be busy."""


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
async def test_ten_thousand_queue_at_once(tmp_path: Path, record_property: Record) -> None:
    """Each on a connection of its own, for 256 places. The engine is held until nearly all have asked; in its
    moments it writes few of texts this long."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    requests = [plain(kind, 60 + kind % 3, prompt=f"{kind}", temperature=0.7, stream=False) for kind in range(KINDS)]
    most = ("--max-connections", "--max-connections-per-address", "--max-queue")
    flags = [word for flag in most for word in (flag, str(MANY + 100))]
    flags += ["--max-sequences", str(PLACES), "--cache-bytes", str(POOL)]
    # Those who connect first say nothing until all others have connected.
    flags += ["--head-timeout", str(WAIT), "--request-timeout", str(WAIT)]
    with serving(tmp_path, *flags) as server:
        engine, port = engine_of(server), httpx.URL(server.url).port
        assert engine and port
        async with talking(server) as http:
            expected = await undisturbed(http, requests)
        gate = Gate(asyncio.Event(), asyncio.Semaphore(100))
        asked = [asyncio.create_task(gate.ask(port, requests[number % KINDS])) for number in range(MANY)]
        await until(lambda: gate.connected == MANY, WAIT)
        pids = server.process.pid, engine
        before = peak = [private_bytes(pid) for pid in pids]
        began = time.monotonic()
        holding = asyncio.create_task(hold(engine))
        gate.opens.set()
        queued = 0.0
        while queued < MANY * 0.9:
            queued = await asyncio.to_thread(sequences, server, "waiting")
            assert time.monotonic() - began < WAIT
        holding.cancel()
        waiting = asyncio.gather(*asked)
        while not waiting.done():
            peak = [max(then, private_bytes(pid)) for then, pid in zip(peak, pids, strict=True)]
            await asyncio.sleep(0.25)
        found, seconds = await waiting, time.monotonic() - began
        assert engine_of(server) == engine
    for number, answer in enumerate(found):
        assert answer == expected[number % KINDS], requests[number % KINDS]
    grown = [now - then for now, then in zip(peak, before, strict=True)]
    shown = f"server {grown[0] >> 20} MiB more, engine {grown[1] >> 20} with its caches"
    assert grown[0] < MANY * MOST_EACH and grown[1] < MANY * MOST_EACH + POOL
    record_property(
        "figure", f"{MANY} queued for {PLACES} places, {queued:.0f} at once: all right within {seconds:.0f} s; {shown}"
    )


async def hold(engine: int) -> None:
    """Stops it, but for moments in which its heart beats."""
    try:
        while True:
            send(engine, signal.SIGSTOP)
            await asyncio.sleep(STOPPED)
            send(engine, signal.SIGCONT)
            await asyncio.sleep(2 * BEAT_SECONDS)
    finally:
        send(engine, signal.SIGCONT)


@dataclass
class Gate:
    """Where clients wait, connected, until all are."""

    opens: asyncio.Event
    entrance: asyncio.Semaphore
    connected: int = 0

    async def ask(self, port: int, fields: Fields) -> Answer:
        async with self.entrance:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        self.connected += 1
        await self.opens.wait()
        writer.write(post(fields, "connection: close"))
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        answer = Answer(int(head.split()[1]))
        answer.add(json.loads(body))
        return answer


@pytest.mark.faults
async def test_deadlines_hold_under_load(tmp_path: Path, record_property: Record) -> None:
    """200 requests with deadlines between 0.3 and 3 s, more than the server can finish."""
    random = Random(53)
    with serving(tmp_path) as server:
        fields = [plain(n, 4000, timeout=random.uniform(0.3, 3), stream=False) for n in range(DEADLINES)]
        asked = (lateness(server, random.uniform(0, 3), each) for each in fields)
        late = sorted(await asyncio.gather(*asked))
    middle = late[DEADLINES // 2]
    shown = f"{DEADLINES} deadlines: {middle:.2f} s late in the middle, {late[-1]:.2f} s at most"
    record_property("figure", shown)
    assert late[0] > -0.05
    assert middle < LATE_MIDDLE and late[-1] < LATE_MOST, shown


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
