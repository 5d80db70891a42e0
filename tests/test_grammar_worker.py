"""Grammars are compiled in processes that may hang and crash, at no cost to anything else."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import uvloop
from llguidance import LLMatcher

from benchmarks.grammars import GRAMMARS
from server import grammars
from server.errors import ApiError
from server.grammar_worker import SECONDS, SLOW_TEXTS
from server.grammars import CRASHED, SLOW, UNANSWERED, Grammars, Worker

ROOT = Path(__file__).parent.parent
GOOD, BAD, EXPLODING = 'start: "a"', "start: nope", "start: /(a{1000}){1000}/"


def pids(checks: Grammars) -> list[int]:
    """The processes that have been started."""
    return [worker.pid for worker in checks._workers if worker.pid]


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.stop()
    worker.close()


def test_a_worker_outlives_bad_grammars_and_is_replaced_after_exploding_ones(worker: Worker) -> None:
    assert worker.check(GOOD) == (None, True)
    first = worker.pid
    fault, is_certain = worker.check(BAD)
    assert fault and "unknown name" in fault and is_certain
    assert worker.check(GOOD) == (None, True) and worker.pid == first
    assert worker.check(EXPLODING) == (SLOW, False)
    assert worker.check(GOOD) == (None, True) and worker.pid != first


def of_lark(lark: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": lark}]})


def of_schema(schema: dict[str, object]) -> str:
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})


def test_bytes_of_texts_are_tried(worker: Worker) -> None:
    many = range(60)
    units = [f"s{n}: " + " | ".join(f"s{other}" for other in many if other != n) + ' | "a"' for n in many]
    # Nothing is slow before the second byte.
    fault, is_certain = worker.check(of_lark("\n".join(['start: ("qz" | "wz") s0', *units])))
    assert (fault, is_certain) in ((SLOW_TEXTS, True), (SLOW, False))
    alternatives = [f's{n}: "b" "x{n}"' for n in range(400)]
    wide = "\n".join(["start: s*", "s: " + " | ".join(f"s{n}" for n in range(400)), *alternatives])
    fault, is_certain = worker.check(of_lark(wide))
    assert fault and "max is 250" in fault and is_certain
    # Short texts may match an ambiguous one, and what is wide or takes many states of a lexer is not slow.
    properties = {f"p{n}": {"type": "integer"} for n in range(251)}
    more = of_schema({"type": "object", "properties": properties, "additionalProperties": False})
    del properties["p250"]
    most = of_schema({"type": "object", "properties": properties, "additionalProperties": False})
    fault, is_certain = worker.check(more)
    assert fault and "max is 1000; make fewer properties of an object optional" in fault and is_certain
    good = [
        of_lark('start: s\ns: s s | "a" | "b" |'),
        of_lark("\n".join(["start: s*", "s: " + " | ".join(f"s{n}" for n in range(200)), *alternatives[:200]])),
        most,
        LLMatcher.grammar_from_regex(r"(?:\p{L}|[0-9 ]{3}){1,200}"),
        *(grammar.text for grammar in GRAMMARS.values()),
    ]
    assert [worker.check(grammar) for grammar in good] == [(None, True)] * len(good)


def test_a_crash_is_the_fault_of_its_grammar_alone(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    worker.check(GOOD)
    assert worker.pid
    monkeypatch.setattr(grammars, "MOST_SECONDS", 10.0)
    # A stopped process has not answered when it is killed, as after a stack overflow.
    os.kill(worker.pid, signal.SIGSTOP)
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.1; kill -SEGV {worker.pid}; kill -CONT {worker.pid}"])
    assert worker.check(GOOD) == (CRASHED, False)
    assert killer.wait() == 0
    assert worker.check(GOOD) == (None, True)
    # One that has ended while it was idle is no grammar's fault.
    os.kill(worker.pid, signal.SIGKILL)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    assert worker.check(GOOD) == (None, True)


def test_a_busy_machine_refuses_no_grammar_that_another_would_take(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.check(GOOD)
    assert worker.pid
    # It gets no processor for longer than the compilation may take.
    os.kill(worker.pid, signal.SIGSTOP)
    going_on = subprocess.Popen(["sh", "-c", f"sleep {1.5 * SECONDS}; kill -CONT {worker.pid}"])
    assert worker.check('start: "b"') == (None, True)
    assert going_on.wait() == 0
    monkeypatch.setattr(grammars, "MOST_SECONDS", 0.1)
    os.kill(worker.pid, signal.SIGSTOP)
    assert worker.check('start: "c"') == (UNANSWERED, False)


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_equal_grammars_are_compiled_once_and_few_wait(loop: object, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()
    check = Worker.check

    def counted(worker: Worker, grammar: str) -> grammars.Verdict:
        asked.append(grammar)
        return check(worker, grammar)

    monkeypatch.setattr(Worker, "check", counted)
    monkeypatch.setattr(grammars, "WAITING", 3)
    monkeypatch.setattr(grammars, "REMEMBERED", 2)

    async def use(checks: Grammars) -> None:
        some = [f'start: "{i}"' for i in range(4)]
        tasks = [asyncio.create_task(checks.fault(grammar)) for grammar in some[:3] * 5]
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="wait: 3") as refused:
            await checks.fault(some[3])
        assert refused.value.status == 429 and refused.value.headers == {"retry-after": "7"}
        # One that leaves ends no check of another's.
        tasks.pop(0).cancel()
        assert await asyncio.gather(*tasks) == [None] * 14 and len(pids(checks)) == 2
        assert sorted(asked) == some[:3]
        assert await checks.fault(some[3]) is None and await checks.fault(some[3]) is None
        # The one used least recently is forgotten.
        assert await checks.fault(some[0]) is None
        assert asked[3:] in ([some[3], some[0]], [some[3]])
        assert len(checks._known) == 2 and not checks._checks

    with closing(Grammars(7)) as checks, asyncio.Runner(loop_factory=loop) as runner:  # type: ignore[arg-type]
        runner.run(use(checks))
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids(checks))


def test_a_key_has_a_share_of_the_line_and_what_nobody_waits_for_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, go = list[str](), threading.Event()

    def slow(worker: Worker, grammar: str) -> grammars.Verdict:
        asked.append(grammar)
        assert go.wait(60)
        return grammars.Verdict(None)

    monkeypatch.setattr(Worker, "check", slow)
    monkeypatch.setattr(grammars, "WAITING", 16)

    async def use() -> None:
        with closing(Grammars(1, lambda: True)) as checks:
            mine = [asyncio.create_task(checks.fault(str(i), b"mine")) for i in range(4)]
            await asyncio.sleep(0)
            with pytest.raises(ApiError, match="wait: 4, 4 of them of this API key") as refused:
                await checks.fault("4", b"mine")
            assert refused.value.status == 429
            other = asyncio.create_task(checks.fault("other", b"other"))
            # Two are under way, one has another client that waits, one has not begun and nobody waits for it.
            same = asyncio.create_task(checks.fault("2", b"other"))
            await asyncio.sleep(0)
            for task in mine:
                task.cancel()
            await asyncio.wait(mine)
            assert len(checks._checks) == 4
            # It is asked for again, before the loop has told that it was cancelled.
            again = asyncio.create_task(checks.fault("3", b"other"))
            await asyncio.sleep(0)
            go.set()
            assert await asyncio.gather(other, same, again) == [None] * 3
            await asyncio.gather(*(check.verdict for check in checks._checks.values()))
            assert sorted(asked) == ["0", "1", "2", "3", "other"] and len(checks._known) == 5

    asyncio.run(use())


def test_closing_ends_a_check_under_way() -> None:
    async def use() -> None:
        checks = Grammars(1)
        assert await checks.fault(GOOD) is None
        task = asyncio.create_task(checks.fault(EXPLODING))
        await asyncio.sleep(0.1)
        checks.close()
        with pytest.raises(RuntimeError, match="shutting down"):
            await task
        assert not Path(f"/proc/{pids(checks)[0]}").exists()

    asyncio.run(use())


def test_the_worker_bounds_its_memory_and_imports_no_torch() -> None:
    code = (
        "import resource, sys, server.grammar_worker as worker\n"
        "assert 'torch' not in sys.modules and 'fastapi' not in sys.modules\n"
        "worker.main()\n"
        "assert resource.getrlimit(resource.RLIMIT_AS)[0] == worker.MEMORY\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=b'"start: \\"a\\""\n"("\n', stdout=subprocess.PIPE, cwd=ROOT
    )
    ready, good, bad = done.stdout.splitlines()
    assert done.returncode == 0 and ready == good == b"null" and bad.startswith(b'"')
