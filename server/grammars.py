"""Whether a grammar of a client can be used, found out in processes of its own (`server.grammar_worker`)."""

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import NamedTuple

from .errors import ApiError
from .grammar_worker import SECONDS

WORKERS = 2
"""Most processes that compile. Each is started when it is needed, and stays."""
MOST_SECONDS = 5.0
"""Most time for an answer, on a machine so busy that the process hardly runs."""
START_SECONDS = 30.0
"""Most time for a process to start."""
WAITING = 64
"""Most grammars at a time that are being compiled or wait for it."""
SHARE = 4
"""Where there are several API keys, each may have one in so many of these places."""
REMEMBERED = 1024
"""Grammars whose verdict is kept, as hashes."""

SLOW = f"its compilation, or a byte of its texts, takes more than {SECONDS:g} s of processor time"
UNANSWERED = f"its compilation does not end within {MOST_SECONDS:g} s on this busy machine"
CRASHED = "its compilation needs too much memory or crashes"


class Verdict(NamedTuple):
    """Whether a grammar can be used. fault: why not; None if it can. is_certain: whether it would come out the same
    again, however busy the machine is."""

    fault: str | None
    is_certain: bool = True


@dataclass
class Check:
    """One under way or in line. api_key: of the client that asked first. waiting: how many clients wait for it."""

    job: Future[Verdict]
    verdict: asyncio.Future[Verdict]
    api_key: bytes
    waiting: int = 0


class Worker:
    """One process, replaced after it has crashed or was too slow. Blocks its thread."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = self._is_stopped = False

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def check(self, grammar: str) -> Verdict:
        """Raises RuntimeError if no process can be started."""
        if not self._process or self._process.poll() is not None:
            self._end()
            self._start()
        assert self._process and self._process.stdin
        try:
            if not self._is_ready:
                self._read(START_SECONDS)
                self._is_ready = True
        except (EOFError, TimeoutError):
            self._end()
            raise RuntimeError("the process that compiles grammars does not start") from None
        try:
            self._process.stdin.write(json.dumps(grammar).encode() + b"\n")
            self._process.stdin.flush()
            return Verdict(json.loads(self._read(MOST_SECONDS)))
        except (EOFError, BrokenPipeError):
            fault = SLOW if self._process.wait() == -signal.SIGPROF else CRASHED
        except TimeoutError:
            fault = UNANSWERED
        self._end()
        # The next grammar need not wait until the new process is ready.
        self._start()
        return Verdict(fault, is_certain=False)

    def stop(self) -> None:
        """Ends it for good; a check under way then fails. The only method that another thread may call."""
        self._is_stopped = True
        if self._process:
            self._process.kill()

    def close(self) -> None:
        """After `stop`."""
        self._end()

    def _start(self) -> None:
        if self._is_stopped:
            raise RuntimeError("the server is shutting down")
        # A process of its own session gets no Ctrl-C of a terminal. It ends when the parent's end of the pipe closes.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "server.grammar_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=_environment(),
        )
        self._is_ready = False

    def _end(self) -> None:
        if process := self._process:
            process.kill()
            process.wait()
            assert process.stdin and process.stdout
            process.stdout.close()
            # What was not written yet is lost.
            with suppress(BrokenPipeError):
                process.stdin.close()

    def _read(self, seconds: float) -> bytes:
        """The next line. Raises TimeoutError, and EOFError if the process has ended."""
        assert self._process and self._process.stdout
        out = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(out, select.POLLIN)
        deadline = time.monotonic() + seconds
        line = b""
        while not line.endswith(b"\n"):
            if not poll.poll(max(deadline - time.monotonic(), 0) * 1000):
                raise TimeoutError
            if not (part := os.read(out, 1 << 16)):
                raise EOFError
            line += part
        return line


class Grammars:
    """All checks of one server. `fault` runs on its event loop, which no check blocks."""

    def __init__(self, retry_after: int, is_shared: Callable[[], bool] = lambda: False) -> None:
        """is_shared: whether there are several API keys."""
        self._is_shared = is_shared
        self._headers = {"retry-after": str(retry_after)}
        self._threads = ThreadPoolExecutor(WORKERS, "grammars")
        self._workers = [Worker() for _ in range(WORKERS)]
        self._free = deque(self._workers)
        self._known: OrderedDict[bytes, str | None] = OrderedDict()
        self._checks: dict[bytes, Check] = {}

    async def fault(self, grammar: str, api_key: bytes = b"") -> str | None:
        """Why it cannot be used; None if it can. Equal grammars are compiled once. Raises ApiError 429."""
        key = sha256(grammar.encode()).digest()
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        if key not in self._checks:
            self._admit(api_key)
            job = self._threads.submit(self._check, grammar)
            self._checks[key] = Check(job, asyncio.wrap_future(job), api_key)
            self._checks[key].verdict.add_done_callback(lambda done: self._learn(key, done))
        check = self._checks[key]
        check.waiting += 1
        try:
            # A client that leaves must not end the check for others.
            return (await asyncio.shield(check.verdict)).fault
        finally:
            check.waiting -= 1
            if not check.waiting and check.job.cancel():
                # Nobody needs it, and it has not begun.
                del self._checks[key]

    def close(self) -> None:
        """Ends all processes. Checks under way fail, at once."""
        for worker in self._workers:
            worker.stop()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def _admit(self, api_key: bytes) -> None:
        """Raises ApiError 429 if there is no room for one more check, or none for one of the key."""
        of_key = sum(check.api_key == api_key for check in self._checks.values())
        if len(self._checks) >= WAITING or (self._is_shared() and of_key >= WAITING // SHARE):
            message = f"too many grammars wait: {len(self._checks)}, {of_key} of them of this API key; try again later"
            raise ApiError(429, message, code="queue_full", headers=self._headers)

    def _check(self, grammar: str) -> Verdict:
        with self._worker() as worker:
            return worker.check(grammar)

    @contextmanager
    def _worker(self) -> Iterator[Worker]:
        """One that no other thread uses: the one used last, so that others start only if they are needed."""
        worker = self._free.pop()
        try:
            yield worker
        finally:
            self._free.append(worker)

    def _learn(self, key: bytes, check: asyncio.Future[Verdict]) -> None:
        if check.cancelled():
            return
        del self._checks[key]
        if not check.exception() and check.result().is_certain:
            self._known[key] = check.result().fault
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)


def _environment() -> dict[str, str]:
    """Without settings of the server, which hold API keys; with all places where its own modules were found."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FASTBLT_")}
    path = os.pathsep.join(os.path.abspath(place) for place in sys.path)
    # numpy would reserve address space for a thread per core.
    return kept | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
