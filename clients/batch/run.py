"""Sends a batch: so many requests at a time, tried again where the server was busy or the connection was lost."""

import asyncio
import concurrent.futures
import os
import sqlite3
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import httpx

from ..address import base_url
from ..fastblt_client import ConnectionFailed, api_error, connection_failed, is_untrusted, retry_delay, trusting
from ..progress import Progress
from .index import Index
from .requests import PATH, Answered, Refused, Request, count_lines, pending
from .results import BatchError, Results, answer, failure, is_good

STANDARD = Path("-")
UNAUTHORISED = (401, 403)
JSON = {"content-type": "application/json"}


class Settings(NamedTuple):
    """concurrency: requests at a time. retries: further tries of a request. timeout: seconds without any byte.
    ca_file: certificates to trust instead of the system's."""

    url: str
    api_key: str | None = None
    concurrency: int = 16
    retries: int = 10
    timeout: float = 600.0
    ca_file: Path | None = None


@dataclass(slots=True)
class Counts:
    """Lines of the input. total: None if unknown. earlier: answered by an earlier run. failed: without an answer of
    status 200, also by an earlier run. retried: tries beyond a request's first."""

    total: int | None = None
    done: int = 0
    earlier: int = 0
    failed: int = 0
    retried: int = 0

    def __str__(self) -> str:
        of = "" if self.total is None else f" of {self.total:,}"
        parts = {"answered by an earlier run": self.earlier, "failed": self.failed, "retries": self.retried}
        return ", ".join([f"{self.done:,}{of} lines", *(f"{n:,} {what}" for what, n in parts.items() if n)])


Item = Request | Refused | Answered | Exception | None
"""What the reader found: an exception if it failed, None at the end."""


def run(source: Path, target: Path, settings: Settings, counts: Counts) -> None:
    """Answers every line of source in target; `-` is standard input and output. counts: kept up to date, also where
    this raises.

    Raises BatchError if target is no batch's output or the server refuses the key; ConnectionFailed if the server is
    out of reach; ValueError for a wrong url; OSError."""
    base_url(settings.url)
    if STANDARD not in (source, target) and target.exists() and source.samefile(target):
        raise BatchError(f"{target}: the output must not be the input")
    with _opened(source) as file, closing(Index()) as index:
        if file.seekable():
            counts.total = count_lines(file)
            file.seek(0)
        if target == STANDARD:
            results = Results(os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0))
        else:
            results = Results.open(target)
        with closing(results):
            if target != STANDARD:
                counts.failed = results.read_into(index, target)
            with Progress("batch", counts.total) as progress:
                asyncio.run(_Batch(settings, results, counts, progress).run(file, index))


@contextmanager
def _opened(source: Path) -> Iterator[BinaryIO]:
    if source == STANDARD:
        # Not Python's own reader, and never closed: both would wait for the thread that reads.
        yield open(sys.stdin.fileno(), "rb", closefd=False)  # noqa: SIM115
    else:
        with source.open("rb") as file:
            yield file


class _Batch:
    def __init__(self, settings: Settings, results: Results, counts: Counts, progress: Progress) -> None:
        self._settings, self._results, self._counts, self._progress = settings, results, counts, progress

    async def run(self, file: BinaryIO, index: Index) -> None:
        limits = httpx.Limits(max_connections=self._settings.concurrency)
        key = self._settings.api_key
        queue: asyncio.Queue[Item] = asyncio.Queue(self._settings.concurrency)
        _start_reader(file, index, queue)
        ca_file = self._settings.ca_file
        async with httpx.AsyncClient(
            base_url=base_url(self._settings.url),
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(self._settings.timeout, connect=10.0),
            limits=limits,
            verify=trusting(ca_file) if ca_file else True,
        ) as http:
            try:
                async with asyncio.TaskGroup() as tasks:
                    for _ in range(self._settings.concurrency):
                        tasks.create_task(self._work(http, queue))
            except ExceptionGroup as group:
                raise group.exceptions[0] from None

    async def _work(self, http: httpx.AsyncClient, queue: asyncio.Queue[Item]) -> None:
        while (item := await queue.get()) is not None:
            match item:
                case Exception():
                    raise item
                case Answered():
                    self._counts.earlier += 1
                case Refused(line, error):
                    self._write(failure(error.custom_id, error.code, str(error), line, error.param))
                case Request():
                    self._write(await self._send(http, item))
            self._counts.done += 1
            self._progress.update(self._counts.done, str(self._counts))
        # The reader has ended, so that there is room: for the next worker.
        queue.put_nowait(None)

    def _write(self, result: dict[str, Any]) -> None:
        self._results.write(result)
        self._counts.failed += not is_good(result)

    async def _send(self, http: httpx.AsyncClient, request: Request) -> dict[str, Any]:
        """The line to write. Raises BatchError or ConnectionFailed where no line could be answered."""
        attempt = 0
        while True:
            retry_after = ""
            try:
                response = await http.post(PATH, content=request.body, headers=JSON)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                unreachable = connection_failed(error)
                if is_untrusted(error):
                    raise unreachable from None
                last: ConnectionFailed | dict[str, Any] = unreachable
            except httpx.TimeoutException:
                message = f"no byte came for {self._settings.timeout:g} s (--timeout)"
                return failure(request.custom_id, "timeout", message)
            except httpx.RequestError as error:
                message = f"the connection was lost {attempt + 1} times: {error or type(error).__name__}"
                last = failure(request.custom_id, "connection_lost", message)
            else:
                body = _body(response)
                if response.is_success and not isinstance(body, dict):
                    message = f"status {response.status_code}, but no JSON object: {response.text[:200]}"
                    return failure(request.custom_id, "invalid_answer", message)
                body = _as_error(response) if body is None else body
                last = answer(request.custom_id, response.status_code, response.headers.get("x-request-id"), body)
                if response.status_code in UNAUTHORISED:
                    raise BatchError(f"the server refuses the API key: {_message(last)}")
                refusal = api_error(response)
                if response.is_success or not refusal.passes:
                    return last
                retry_after = refusal.retry_after
            if attempt >= self._settings.retries:
                if isinstance(last, ConnectionFailed):
                    raise last
                return last
            await asyncio.sleep(retry_delay(attempt, retry_after))
            attempt += 1
            self._counts.retried += 1


def _start_reader(file: BinaryIO, index: Index, queue: asyncio.Queue[Item]) -> None:
    """Reads in a thread, since standard input may wait for ever. A daemon, since nothing can interrupt that."""
    loop = asyncio.get_running_loop()

    def put(item: Item) -> None:
        if loop.is_closed():
            raise RuntimeError
        asyncio.run_coroutine_threadsafe(queue.put(item), loop).result()

    def read() -> None:
        try:
            try:
                for item in pending(file, index):
                    put(item)
                put(None)
            except sqlite3.Error as error:
                put(BatchError(f"the index of custom_ids, in {tempfile.gettempdir()}: {error}"))
            except (OSError, ValueError) as error:
                put(error)
        except (concurrent.futures.CancelledError, RuntimeError):
            return  # The batch has ended before its input.

    threading.Thread(target=read, daemon=True).start()


def _body(response: httpx.Response) -> Any:
    """None where it is no JSON, such as a proxy's page."""
    try:
        return response.json()
    except (ValueError, RecursionError):
        return None


def _as_error(response: httpx.Response) -> dict[str, Any]:
    """As OpenAI's."""
    return {"error": {"message": f"HTTP status {response.status_code}: {response.text[:200]}"}}


def _message(result: dict[str, Any]) -> str:
    try:
        return str(result["response"]["body"]["error"]["message"])
    except (LookupError, TypeError):
        return f"HTTP status {result['response']['status_code']}"
