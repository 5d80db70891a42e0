"""The engine's process dies: every stream goes on with the same bytes."""

import asyncio
import signal
import time
from pathlib import Path
from random import Random

import pytest

from tests.faults.asking import (
    LATE,
    Answer,
    Record,
    ask,
    ask_all,
    check,
    engine_of,
    kill,
    killed,
    mixed,
    new_engine,
    plain,
    send,
    serving,
    talking,
    under_way,
    undisturbed,
    until,
)
from tests.serving import free_port

KILLS = 20


@pytest.mark.faults
async def test_streams_of_every_kind_survive_two_deaths_in_a_row(tmp_path: Path, record_property: Record) -> None:
    """32 streams, KILL, ready, KILL."""
    requests = mixed(32, seed=1)
    async with under_way(tmp_path, requests) as streams:
        server, http = streams.server, streams.http
        pause = await killed(server, http)
        kill(server)
        await streams.check()
        assert server.metrics("fastblt_engine_restarts_total")["fastblt_engine_restarts_total"] == 2
    record_property("figure", f"two KILLs under 32 streams: all right; an engine is back after {pause:.1f} s")


@pytest.mark.faults
async def test_streams_of_every_kind_survive_many_deaths(tmp_path: Path, record_property: Record) -> None:
    """32 clients ask again and again while the engine is killed 20 times at random moments."""
    requests, random, answered, over = mixed(32, seed=2, most=600), Random(3), 0, False
    with serving(tmp_path) as server:
        async with talking(server) as http:
            expected = await undisturbed(http, requests)

            async def client(number: int) -> None:
                nonlocal answered
                while not over:
                    check([requests[number]], [await ask(http, requests[number])], [expected[number]])
                    answered += 1

            async with asyncio.TaskGroup() as clients:
                for number in range(len(requests)):
                    clients.create_task(client(number))
                for _ in range(KILLS):
                    await asyncio.sleep(random.uniform(0.02, 1.5))
                    await killed(server, http)
                over = True
    record_property("figure", f"{KILLS} KILLs under 32 streams: {answered} answers, all right")


@pytest.mark.faults
async def test_streams_survive_a_death_while_the_next_engine_loads(tmp_path: Path) -> None:
    requests, random = mixed(16, seed=4), Random(5)
    async with under_way(tmp_path, requests) as streams:
        server = streams.server
        pid = kill(server)
        for _ in range(6):
            pid = await new_engine(server, pid)
            await asyncio.sleep(random.uniform(0, 1.5))
            send(pid, signal.SIGKILL)
        await streams.check()


@pytest.mark.faults
async def test_an_engine_that_dies_in_a_prefill_delays_short_streams_little(
    tmp_path: Path, record_property: Record
) -> None:
    """Eight short streams and a prompt of 20,000 bytes: the short ones go on first."""
    text = "".join((Path(__file__).parent / name).read_text() for name in ("asking.py", "test_death.py"))
    requests = [plain(number, 1500) for number in range(8)]
    requests.append(plain(8, 40, prompt=(text * 2)[:20_000]))
    with serving(tmp_path, "--cache-bytes", str(1 << 28), "--no-prefix-cache") as server:
        async with talking(server) as http:
            expected = await undisturbed(http, requests)
            answers = [Answer() for _ in requests]
            asked = asyncio.gather(*(ask(http, *pair) for pair in zip(requests, answers, strict=True)))
            await until(lambda: all(answer.times for answer in answers[:8]))
            assert not answers[8].times
            died = time.monotonic()
            back = await killed(server, http)
            await asked
    check(requests, answers, expected)
    pauses = [next(at for at in answer.times if at > died + 0.2) - died for answer in answers]
    assert max(pauses[:8]) < pauses[8]
    assert max(pauses[:8]) < back + LATE
    shown = ", ".join(f"{pause:.1f}" for pause in pauses[:8])
    record_property("figure", f"engine back after {back:.1f} s; pauses {shown}; 20 kB prompt {pauses[8]:.1f} s")


async def test_the_engine_ends_with_the_server_and_the_port_is_free(tmp_path: Path) -> None:
    """KILL of the HTTP process."""
    with serving(tmp_path, "--port", str(port := free_port())) as server:
        engine = engine_of(server)
        async with talking(server) as http:
            asked = asyncio.gather(*(ask(http, plain(number, 2000)) for number in range(4)), return_exceptions=True)
            await asyncio.sleep(0.3)
            server.process.kill()
            assert server.process.wait() == -signal.SIGKILL
            assert all(isinstance(outcome, Exception) for outcome in await asked)
        deadline = time.monotonic() + 1 + LATE
        while Path(f"/proc/{engine}").exists():
            assert time.monotonic() < deadline, "the engine outlives the server"
            await asyncio.sleep(0.02)
    (tmp_path / "next").mkdir()
    with serving(tmp_path / "next", "--port", str(port)) as server:
        async with talking(server) as http:
            (answer,) = await ask_all(http, [plain(1, 20)])
            assert answer.status == 200
