"""The engine process and its client: what a reader sees when processes start, stop, crash and hang."""

import asyncio
import os
import resource
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.config import BYTE_OFFSET, EngineConfig
from engine.process import child
from engine.process.client import EngineClient, EngineDead, EngineStartError
from engine.process.streams import GRACE_SECONDS, ID_BYTES, SCORE_BYTES, Stream
from engine.process.wire import SCORES_AT_ONCE, Batch, Scores, decode_message, encode, messages
from engine.types import (
    Abort,
    Command,
    Delta,
    Event,
    Failed,
    Finished,
    Request,
    Shutdown,
    Snapshot,
    TokenLogprob,
    Usage,
)
from tests.scripted_engine import prompt_ids, scripted_ids, scripted_logprob
from tests.streams import Transcript, kill, killer, read

pytestmark = pytest.mark.asyncio

FACTORY = "tests.scripted_engine:ScriptedEngine"


def request(prompt: str, max_tokens: int = 40, **options: object) -> Request:
    return Request(id=f"id-{prompt}", prompt_ids=prompt_ids(prompt), max_tokens=max_tokens, **options)  # type: ignore[arg-type]


def scripted_text(prompt: str, length: int) -> bytes:
    return bytes(i - BYTE_OFFSET for i in scripted_ids(prompt, 0, length))


@asynccontextmanager
async def running(model: Path, **options: object) -> AsyncIterator[EngineClient]:
    client = EngineClient(EngineConfig(model=str(model)), engine_factory=FACTORY, **options)  # type: ignore[arg-type]
    await client.start()
    try:
        yield client
    finally:
        await client.stop()


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        await asyncio.sleep(0.01)


async def test_each_of_many_streams_equals_the_engines_output_and_ends_once(tmp_path: Path) -> None:
    async with running(tmp_path) as client:
        assert (client.state, client.limits.name, client.limits.pages) == ("ready", "scripted", {"byte": 8})
        heard = await asyncio.gather(*(read(client, request(f"p{i}", max_tokens=i)) for i in range(1, 51)))
        for i, transcript in enumerate(heard, 1):
            assert transcript.ids == scripted_ids(f"p{i}", 0, i)
            assert transcript.text == scripted_text(f"p{i}", i)
            assert transcript.finished.reason == "length"
            assert transcript.finished.usage.completion_tokens == i
        await eventually(lambda: client.snapshot.running == 0 and client.snapshot.steps >= 50)


async def test_a_flood_of_requests_lets_steps_run_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    seen: list[str] = []

    class SlowToAdd:
        has_work = False

        def add(self, request: Request) -> None:
            nonlocal now
            now += child.COMMANDS_SECONDS / 2.5
            self.has_work = True
            seen.append(request.id)

        def abort(self, request_id: str) -> None:
            seen.append(f"abort {request_id}")

        def step(self) -> list[Event]:
            seen.append("step")
            return []

        step_bound, snapshot = float, Snapshot

    asked = [Request(id=name, prompt_ids=[5], max_tokens=1) for name in "abcdefgh"]
    commands: list[Command] = [*asked, Abort("a"), Abort("h"), Shutdown()]
    queue = iter([encode(command) for command in commands])
    # The last command ends the loop, so there is always one to read.
    socket: Any = SimpleNamespace(poll=lambda *_: True, recv=lambda: next(queue), send=lambda _: None)
    heart: Any = SimpleNamespace(step=lambda run, _: run())
    engine: Any = SlowToAdd()
    monkeypatch.setattr(child, "time", SimpleNamespace(monotonic=lambda: now))
    child._serve(engine, socket, heart)
    assert seen == ["a", "b", "c", "step", "d", "e", "f", "step", "g", "h", "abort a", "abort h"]


async def test_many_scores_of_a_prompt_come_in_several_messages_and_are_read_at_once() -> None:
    entries = [TokenLogprob(5, -1.0, {token: -2.0 for token in range(259)}) for _ in range(200)]
    scored = Delta(id="a", ids=[5], text=b"a", prompt_logprobs=[TokenLogprob(1, None, {}), *entries])
    others = [Delta(id="b", ids=[6]), Finished(id="c", reason="stop", usage=Usage())]
    *parts, batch = [decode_message(encode(message)) for message in messages([scored, *others], None)]
    assert isinstance(batch, Batch) and batch.events[1:] == others and len(parts) == 3
    stream = Stream(Request(id="a", prompt_ids=[1, *[5] * 200], max_tokens=1, prompt_logprobs=True))
    stream.send()
    for part in parts:
        assert isinstance(part, Scores) and part.id == "a" and len(part.entries) * 260 <= SCORES_AT_ONCE
        stream.score(part.entries)
    # The engine ends, and the next one scores the prompt again.
    assert stream.send().prompt_logprobs
    for part in parts:
        assert isinstance(part, Scores)
        stream.score(part.entries)
    stream.put(batch.events[0])
    assert await stream.next() == scored


async def test_closing_a_stream_early_aborts_its_request(tmp_path: Path) -> None:
    async with running(tmp_path) as client:
        async with aclosing(client.submit(request("long", max_tokens=9999))) as stream:
            await anext(stream)
            await eventually(lambda: client.snapshot.running == 1)
        await eventually(lambda: client.snapshot.running == 0)
        task = asyncio.create_task(read(client, request("long", max_tokens=9999)))
        await eventually(lambda: client.snapshot.running == 1)
        task.cancel()
        await eventually(lambda: client.snapshot.running == 0)
        assert client.restarts == 0


async def test_the_parent_learns_how_many_log_lines_were_dropped(tmp_path: Path) -> None:
    async with running(tmp_path) as client:
        assert client.snapshot.dropped_log_lines == 0
        await read(client, request("shout:1", max_tokens=3))
        await eventually(lambda: client.snapshot.dropped_log_lines == 1)


async def test_two_requests_in_flight_cannot_share_an_id(tmp_path: Path) -> None:
    async with running(tmp_path) as client, aclosing(client.submit(request("a", max_tokens=9999))) as stream:
        await anext(stream)
        with pytest.raises(ValueError, match="id-a"):
            await read(client, request("a"))
        assert await anext(stream)


async def test_a_slow_reader_gets_one_merged_delta_and_stalls_no_other_stream(tmp_path: Path) -> None:
    async with running(tmp_path) as client, aclosing(client.submit(request("slow", max_tokens=30, logprobs=0))) as slow:
        first = await anext(slow)
        each = ID_BYTES + SCORE_BYTES
        quick = await read(client, request("quick", max_tokens=60))
        assert quick.deltas > 20
        # Also what it has taken counts, until it comes for more.
        assert client.unread_bytes("id-slow") == 30 * each
        second = await anext(slow)
        assert client.unread_bytes("id-slow") == len(second.ids) * each
        last = await anext(slow)
        assert client.unread_bytes("id-slow") == client.unread_bytes("id-quick") == 0
        assert isinstance(first, Delta) and isinstance(second, Delta)
        assert first.ids + second.ids == scripted_ids("slow", 0, 30)
        assert len(second.logprobs) == len(second.ids)
        assert isinstance(last, Finished)


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
async def test_streams_continue_with_the_same_bytes_when_the_engine_ends(tmp_path: Path, sign: signal.Signals) -> None:
    stop = scripted_text("stops", 60)[50:]
    async with running(tmp_path) as client:
        scored = request("scored", max_tokens=50, logprobs=0, prompt_logprobs=True)
        heard = await asyncio.gather(
            read(client, request("plain", max_tokens=50), killer(client, 20, sign=sign)),
            read(client, scored),
            read(client, request("stops", max_tokens=90, stop=[stop, b"never"])),
            *(read(client, request(f"p{i}", max_tokens=i)) for i in range(15, 35)),
        )
        assert client.restarts == 1
        plain, scores, stops, *others = heard
        assert plain.ids == scripted_ids("plain", 0, 50)
        assert scores.prompt_logprobs == [TokenLogprob(i, -1.0, {}) for i in prompt_ids("scored")]
        assert [entry.id for entry in scores.logprobs] == scores.ids == scripted_ids("scored", 0, 50)
        assert scores.finished.cumulative_logprob == sum(scripted_logprob(i) for i in range(50))
        assert stops.finished.reason == "stop"
        assert stops.text == scripted_text("stops", 50)
        for i, transcript in enumerate(others, 15):
            assert transcript.ids == scripted_ids(f"p{i}", 0, i)
            assert transcript.text == scripted_text(f"p{i}", i)


async def test_no_text_is_continued_by_another_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (model := tmp_path / "model").write_text("one")
    async with running(model) as client:
        begun = asyncio.create_task(read(client, request("begun", max_tokens=9000), killer(client, 20)))
        await eventually(lambda: client.state == "restarting")
        model.write_text("another")
        # What has no output yet runs in the new engine.
        new = await read(client, request("new", max_tokens=5))
        assert new.ids == scripted_ids("new", 0, 5)
        failed = (await begun).last
        assert isinstance(failed, Failed) and "its checkpoint had been replaced" in failed.message
        assert client.restarts == 1 and not client._streams
    assert "the checkpoint has changed" in caplog.text


async def test_an_engine_gets_a_request_with_the_time_that_it_has_left() -> None:
    stream = Stream(request("a", timeout=30))
    first = stream.send()
    await asyncio.sleep(0.05)
    again = stream.send()
    # What it has cost counts anew.
    assert first.submitted and again.submitted and again.submitted - first.submitted >= 0.05
    assert again.deadline == pytest.approx(first.deadline) == first.submitted + 30


async def test_a_resumed_request_keeps_its_remaining_timeout(tmp_path: Path) -> None:
    async with running(tmp_path) as client:
        began = time.monotonic()
        interrupted: list[float] = []

        def interrupt(_: Transcript) -> None:
            if not interrupted and (now := time.monotonic()) > began + 1:
                interrupted.append(now)
                kill(client)

        heard = await read(client, request("a", max_tokens=99999, timeout=4), interrupt)
        assert client.restarts == 1
        assert heard.finished.reason == "timeout"
        # A request with all its time again would end later.
        assert began + 4 <= time.monotonic() < interrupted[0] + 4
        assert heard.ids == scripted_ids("a", 0, len(heard.ids))


async def test_a_request_made_while_the_engine_restarts_is_served(tmp_path: Path) -> None:
    async with running(tmp_path) as client:
        kill(client)
        await eventually(lambda: client.state == "restarting")
        assert (await read(client, request("new"))).ids == scripted_ids("new", 0, 40)
        assert client.state == "ready"


@pytest.mark.parametrize("prompt", ["exit:5", "raise:0", "garble:5"])
async def test_a_request_that_crashes_the_engine_fails_without_failing_others(tmp_path: Path, prompt: str) -> None:
    async with running(tmp_path) as client:
        innocents = [request(f"p{i}", max_tokens=300) for i in range(5)]
        poison, *others = await asyncio.gather(read(client, request(prompt)), *(read(client, r) for r in innocents))
        assert isinstance(poison.last, Failed)
        assert poison.last.code == "internal" and "alone" in poison.last.message
        # Once among all, once more, and at most twice in halves; three times alone.
        assert 5 <= client.restarts <= 8
        for i, transcript in enumerate(others):
            assert transcript.ids == scripted_ids(f"p{i}", 0, 300)


async def test_work_in_a_thread_delays_no_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with running(tmp_path, step_seconds=5) as client:
        assert isinstance((await read(client, request("leave:5"))).last, Failed)
        assert client.restarts
    assert "ended with exit code 1 while it ran id-leave:5" in caplog.text and "it is killed" not in caplog.text


async def test_a_request_for_which_there_is_never_memory_fails_with_what_would_help(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path) as client:
        starving, other = await asyncio.gather(
            read(client, request("starve:5")), read(client, request("fine", max_tokens=300))
        )
        assert isinstance(starving.last, Failed) and starving.last.code == "internal"
        for words in ("alone: it ran out of memory", "--max-step-rows 512", "--cache-bytes", "--max-sequences"):
            assert words in starving.last.message
        assert other.ids == scripted_ids("fine", 0, 300)
    assert "ran out of memory while it ran id-starve:5" in caplog.text


async def test_no_request_fails_for_kills_that_come_while_it_is_resumed(tmp_path: Path) -> None:
    async with running(tmp_path) as client:
        reading = asyncio.gather(*(read(client, request(f"p{i}", max_tokens=2000)) for i in range(32)))
        await eventually(lambda: client.snapshot.running == 32)
        for restarts in range(1, 5):
            kill(client)
            await eventually(lambda wanted=restarts: client.restarts == wanted, 20)  # type: ignore[misc]
        for i, transcript in enumerate(await reading):
            assert transcript.ids == scripted_ids(f"p{i}", 0, 2000)


async def test_an_engine_whose_step_takes_too_long_is_killed_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path, step_seconds=0.5) as client:
        hanging, other = await asyncio.gather(
            read(client, request("hang:3", timeout=4)), read(client, request("fine", max_tokens=200))
        )
        assert hanging.finished.reason == "timeout" and hanging.ids == scripted_ids("hang:3", 0, 3)
        assert other.ids == scripted_ids("fine", 0, 200)
        # Silence without work is no hang.
        pid, restarts = client.pid, client.restarts
        await asyncio.sleep(1.5)
        assert (client.pid, client.restarts) == (pid, restarts) and restarts
        assert "takes too long for a step; it is killed" in caplog.text
        assert "was killed by the server while it ran id-" in caplog.text and "out of memory?" not in caplog.text
        kill(client)
        await eventually(lambda: client.restarts > restarts)
        assert "was killed (SIGKILL; out of memory?) while it was idle" in caplog.text


@pytest.mark.slow
async def test_a_frozen_engine_is_unready_ends_requests_in_time_and_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.process.client.FROZEN_BEATS", 5)
    async with running(tmp_path) as client:
        stop = [scripted_text("held", 9999)]
        reading = asyncio.create_task(read(client, request("a", max_tokens=2000)))
        began = time.monotonic()
        held = asyncio.create_task(read(client, request("held", max_tokens=9999, timeout=2, stop=stop)))
        await eventually(lambda: client.snapshot.running == 2)
        await asyncio.sleep(0.2)
        kill(client, signal.SIGSTOP)
        late = await held
        assert 2 <= time.monotonic() - began < 2.2 + GRACE_SECONDS
        assert late.finished.reason == "timeout" and late.ids == scripted_ids("held", 0, len(late.ids))
        # What the engine held back for a stop string is text after all.
        assert late.text == scripted_text("held", len(late.ids)) and late.text
        await eventually(lambda: not client.responds)
        assert client.state == "ready" and client.restarts == 0
        assert (await reading).ids == scripted_ids("a", 0, 2000)
        assert client.restarts == 1 and client.responds
        # An engine that goes on in time is kept.
        pid = client.pid or 0
        kill(client, signal.SIGSTOP)
        await eventually(lambda: not client.responds)
        os.kill(pid, signal.SIGCONT)
        await eventually(lambda: client.responds)
        assert (client.pid, client.restarts) == (pid, 1)


async def test_an_engine_that_cannot_load_its_model_again_is_started_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.process.client.LONGEST_PAUSE", 0.3)
    model = tmp_path / "model"
    model.touch()
    async with running(model) as client:
        model.unlink()
        began = time.monotonic()
        reading = asyncio.create_task(read(client, request("a", max_tokens=900), killer(client, 1)))
        await eventually(lambda: client.down(1.5) is not None, 20)
        assert client.state == "restarting" and 1.5 < client.failing_seconds < time.monotonic() - began
        assert client.down(60) is None
        model.touch()
        assert (await reading).ids == scripted_ids("a", 0, 900)
        assert (client.state, client.failing_seconds) == ("ready", 0)


async def test_a_crash_while_descriptors_are_short_is_followed_by_a_restart(tmp_path: Path) -> None:
    async with running(tmp_path) as client:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        reading = asyncio.create_task(read(client, request("a", max_tokens=600)))
        await eventually(lambda: client.snapshot.running == 1)
        taken: list[int] = []
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 20, hard))
            with suppress(OSError):
                while True:
                    taken.append(os.open(os.devnull, os.O_RDONLY))
            kill(client)
            assert (await reading).ids == scripted_ids("a", 0, 600)
        finally:
            for number in taken:
                os.close(number)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert client.restarts == 1


async def test_an_engine_that_does_not_load_in_time_is_killed() -> None:
    client = EngineClient(EngineConfig(model="sleep"), engine_factory=FACTORY, loading_seconds=0.3)
    with pytest.raises(EngineStartError, match="has not loaded its model within 0.3 s"):
        await client.start()
    assert client.pid is None


@pytest.mark.parametrize(
    ("model", "factory", "message"),
    [
        ("/nowhere", FACTORY, "no model at /nowhere"),
        ("exit", FACTORY, "exit code 3 while it was loading"),
        ("/", "no_such_module:Engine", "no_such_module"),
    ],
)
async def test_a_loading_error_reaches_the_parent_as_one_message(
    model: str, factory: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    client = EngineClient(EngineConfig(model=model), engine_factory=factory)
    with pytest.raises(EngineStartError, match=message):
        await client.start()
    assert (client.state, client.pid) == ("dead", None)
    with pytest.raises(EngineDead):
        await read(client, request("a"))
    await client.stop()
    assert "Traceback" not in capfd.readouterr().err


async def test_stopping_the_client_ends_open_streams_and_may_be_repeated(tmp_path: Path) -> None:
    async with running(tmp_path) as client:
        pid = client.pid
        task = asyncio.create_task(read(client, request("a", max_tokens=9999)))
        await eventually(lambda: client.snapshot.running == 1)
        await client.stop()
        assert pid and not exists(pid)
        with pytest.raises(EngineDead, match="stopped"):
            await task
        await client.stop()
        assert client.state == "dead"


async def test_cancelling_the_start_ends_the_engine_process() -> None:
    client = EngineClient(EngineConfig(model="sleep"), engine_factory=FACTORY)
    starting = asyncio.create_task(client.start())
    await eventually(lambda: client.pid is not None)
    pid = client.pid
    starting.cancel()
    await asyncio.wait({starting})
    assert starting.cancelled()
    await eventually(lambda: not exists(pid or 0))
    assert (client.state, client.pid) == ("dead", None)


async def test_ctrl_c_in_the_terminal_does_not_reach_the_engine(tmp_path: Path) -> None:
    async with running(tmp_path) as client:

        def interrupt(_: Transcript) -> None:
            kill(client, signal.SIGINT)

        assert (await read(client, request("a", max_tokens=60), interrupt)).ids == scripted_ids("a", 0, 60)
        assert client.restarts == 0


async def test_a_stopped_client_leaves_no_process_or_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    async def round_trip() -> list[int]:
        async with running(tmp_path) as client:
            first = client.pid or 0
            await read(client, request("a", max_tokens=3))
            kill(client)
            await eventually(lambda: client.restarts == 1)
            assert (await read(client, request("a", max_tokens=3))).ids == scripted_ids("a", 0, 3)
            assert list(tmp_path.iterdir()) == []
            return [first, client.pid or 0]

    await round_trip()
    before = open_files()
    pids = await round_trip()
    await eventually(lambda: open_files() <= before)
    assert not any(exists(pid) for pid in pids)
    assert list(tmp_path.iterdir()) == []


PARENT = """
import asyncio, os, sys
from engine.process.client import EngineClient
from engine.config import EngineConfig

async def main():
    client = EngineClient(EngineConfig(model=sys.argv[1]), engine_factory=sys.argv[2])
    starting = asyncio.create_task(client.start())
    while not client.pid:
        await asyncio.sleep(0.01)
    if sys.argv[1] != "sleep":
        await starting
    print(client.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("model", ["/", "sleep"])
async def test_the_engine_does_not_outlive_its_parent(model: str) -> None:
    command = [sys.executable, "-c", PARENT, model, FACTORY]
    parent = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert parent.stdout
    pid = int(await parent.stdout.readline())
    assert exists(pid)
    parent.kill()
    await parent.wait()
    # An orphan's new parent may take its time to collect it: a zombie has no command line.
    await eventually(lambda: not exists(pid) or not Path(f"/proc/{pid}/cmdline").read_bytes())


@pytest.mark.parametrize(
    ("module", "foreign"), [("engine.process.client", "torch"), ("engine.process.child", "fastapi")]
)
async def test_server_and_engine_processes_import_only_their_own_modules(module: str, foreign: str) -> None:
    code = f"import sys, {module}; sys.exit({foreign!r} in sys.modules)"
    assert await (await asyncio.create_subprocess_exec(sys.executable, "-c", code)).wait() == 0
