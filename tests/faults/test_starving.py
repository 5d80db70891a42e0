"""What a new engine needs is away when the old one dies: it comes once that is back."""

import asyncio
import os
import resource
import time
from pathlib import Path

import httpx
import pytest

from tests.faults.asking import (
    LATE,
    NANO,
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
    serving,
    talking,
    under_way,
    undisturbed,
    until_ready,
)
from tests.raw_http import connected

AWAY_SECONDS = 15.0
FILES = 256
BAD = [b"", b"{", bytes(range(256)), b"[" * 100_000, b'{"version": 1e999}']


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that is models/nano, and can be moved."""
    folder = tmp_path / "nano"
    folder.mkdir()
    for name in ("config.json", "decoders.json", "model.safetensors"):
        (folder / name).symlink_to(NANO / name)
    return folder


@pytest.mark.faults
async def test_an_engine_comes_back_once_its_checkpoint_does(
    tmp_path: Path, model: Path, record_property: Record
) -> None:
    """The folder is renamed for 15 s. Patience with it is 5 s: then the server says so, and still goes on."""
    requests = mixed(16, seed=21)
    async with under_way(tmp_path, requests, "--restart-seconds", "5", model=model) as streams:
        server, http = streams.server, streams.http
        model.rename(tmp_path / "away")
        gone = time.monotonic()
        kill(server)
        await until_ready(http, False, LATE)
        assert (await http.get("/health/live")).status_code == 200
        await asyncio.sleep(gone + 5 + LATE - time.monotonic())
        assert (await http.get("/health/live")).status_code == 503
        assert (await ask(http, plain(1, 8, stream=False))).error["code"] == "engine_dead"
        await asyncio.sleep(gone + AWAY_SECONDS - time.monotonic())
        (tmp_path / "away").rename(model)
        back = time.monotonic()
        await until_ready(http)
        pause = time.monotonic() - back
        assert (await http.get("/health/live")).status_code == 200
        await streams.check()
    record_property("figure", f"checkpoint away for {AWAY_SECONDS:g} s: ready {pause:.1f} s after it was back")


@pytest.mark.faults
async def test_a_bad_file_of_stage_costs_is_made_anew(tmp_path: Path, record_property: Record) -> None:
    """The file goes bad in several ways, each followed by a KILL."""
    requests, costs = mixed(8, seed=22), tmp_path / "costs.json"
    with serving(tmp_path, "--stage-costs", str(costs)) as server:
        async with talking(server) as http:
            expected = await undisturbed(http, requests)
            for content in BAD:
                answers = asyncio.gather(*(ask(http, fields) for fields in requests))
                await asyncio.sleep(0.3)
                costs.write_bytes(content)
                await killed(server, http)
                check(requests, await answers, expected)
                assert costs.read_bytes() != content
    record_property("figure", f"{len(BAD)} bad files of stage costs: each made anew")


@pytest.mark.faults
async def test_an_engine_comes_back_though_no_descriptor_is_free(tmp_path: Path, record_property: Record) -> None:
    """400 idle connections where 256 files may be open; then the limit falls to what is open, and three KILLs."""
    requests = mixed(8, seed=23)
    limited = ("sh", "-c", f'ulimit -n {FILES} && exec "$@"', "sh")
    with serving(tmp_path, prefix=limited) as server:
        port, pid = httpx.URL(server.url).port, server.process.pid
        assert port
        async with talking(server) as http, asyncio.TaskGroup() as idle:
            expected = await undisturbed(http, requests)
            over = asyncio.Event()
            for _ in range(400):
                idle.create_task(connection(port, over))
            await asyncio.sleep(1)
            answers = asyncio.gather(*(ask(http, fields) for fields in requests))
            await asyncio.sleep(0.5)
            files = len(os.listdir(f"/proc/{pid}/fd"))
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (files, FILES))
            engine = engine_of(server)
            for _ in range(3):
                engine = await new_engine(server, kill(server))
                await asyncio.sleep(1)
            check(requests, await answers, expected)
            assert engine_of(server) == engine
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (FILES, FILES))
            check(requests, await ask_all(http, requests), expected)
            over.set()
    record_property("figure", f"{files} files open, and no more allowed: three KILLs, all right")


async def connection(port: int, over: asyncio.Event) -> None:
    """Says nothing. The server may close it for one that does."""
    try:
        async with connected(port):
            await over.wait()
    except OSError:
        pass
