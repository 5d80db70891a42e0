"""A run: requests at a rate, or so many at a time, and what each of them saw."""

import asyncio
import itertools
import json
from collections.abc import Callable, Iterator

from ..fastblt_client import RETRIED, ApiError, BrokenOff, ConnectionFailed, Events, retry_delay
from .arrivals import poisson
from .http import Answer, Lost, Pool, clock
from .percentiles import Gaps
from .record import Outcome, Plan, Record, Run
from .workload import Asked, Workload

PAUSE_SECONDS = 0.1
"""In a closed loop, after a request that was refused or failed."""
LONGEST_KIND = 60
"""Characters of an error's kind: servers choose a part of it."""


async def measure(plan: Plan, pool: Pool, workload: Workload, on_record: Callable[[Run, Record], None]) -> Run:
    """on_record: called at the end of every request. Cancelled, it returns what there is, marked as interrupted."""
    run = Run(plan)
    begin = _Runner(run, pool, on_record)
    try:
        async with asyncio.TaskGroup() as tasks:
            if plan.rate is not None:
                await _open_loop(plan, plan.rate, tasks, begin, workload)
            else:
                requests = _within(plan, begin, workload)
                for _ in range(plan.concurrency or 1):
                    tasks.create_task(_one_after_another(requests, begin))
    except asyncio.CancelledError:
        run.interrupted = True
    run.seconds = begin.elapsed()
    return run


async def _open_loop(plan: Plan, rate: float, tasks: asyncio.TaskGroup, begin: "_Runner", workload: Workload) -> None:
    """Arrivals do not wait for answers."""
    room = asyncio.Semaphore(plan.most_open)

    async def one(asked: Asked, planned: float) -> None:
        try:
            await begin.request(asked, planned)
        finally:
            room.release()

    for planned in itertools.islice(poisson(rate, plan.seed), plan.requests):
        if plan.duration is not None and planned >= plan.duration:
            return await begin.wait_until(plan.duration)
        await begin.wait_until(planned)
        await room.acquire()
        tasks.create_task(one(next(workload), planned))


def _within(plan: Plan, begin: "_Runner", workload: Workload) -> Iterator[Asked]:
    for _ in itertools.count() if plan.requests is None else range(plan.requests):
        if plan.duration is not None and begin.elapsed() >= plan.duration:
            return
        yield next(workload)


async def _one_after_another(requests: Iterator[Asked], begin: "_Runner") -> None:
    for asked in requests:
        if await begin.request(asked, begin.elapsed()) != "done":
            # A server that is gone, or full, fails at once: many thousand times a second.
            await asyncio.sleep(PAUSE_SECONDS)


class _Stream:
    """What comes of one answer."""

    def __init__(self, record: Record, gaps: Gaps) -> None:
        self._record, self._gaps = record, gaps
        self._events = Events()
        self._text_bytes = 0
        self._told_bytes: int | None = None
        self._last: float | None = None
        self.first: float | None = None

    def feed(self, data: bytes, at: float) -> None:
        """Raises ApiError for an error event, ConnectionFailed, and other errors for a wrong event."""
        record, is_text = self._record, False
        for event in self._events.feed(data):
            num_bytes = sum(len(choice.text.encode()) for choice in event.choices)
            is_text = is_text or num_bytes > 0
            self._text_bytes += num_bytes
            record.finish_reason = event.finish_reason or record.finish_reason
            if event.usage and "fastblt" in event.usage:
                # Exact, where a byte that is no UTF-8 comes as the three of U+FFFD.
                self._told_bytes = event.usage["completion_tokens"]
        record.bytes = self._text_bytes if self._told_bytes is None else self._told_bytes
        if is_text:
            record.chunks += 1
            if self._last is None:
                self.first = at
            else:
                self._gaps.add(at - self._last)
                record.longest_gap = max(record.longest_gap, at - self._last)
            self._last = at

    def check_done(self) -> None:
        self._events.check_done()


class _Runner:
    """Does the requests of a run; its clock starts now."""

    def __init__(self, run: Run, pool: Pool, on_record: Callable[[Run, Record], None]) -> None:
        self._run, self._pool, self._on_record = run, pool, on_record
        self._began = clock()

    def elapsed(self) -> float:
        return clock() - self._began

    async def wait_until(self, seconds: float) -> None:
        # Also when late: other requests must come to their turn. Again when early: timers count in milliseconds.
        await asyncio.sleep(max(0.0, seconds - self.elapsed()))
        while (left := seconds - self.elapsed()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left)

    async def request(self, asked: Asked, planned: float) -> Outcome:
        """How it ended. planned: seconds from the start; latency counts from there, whenever it can be sent."""
        record = Record(asked.decoder, planned, self.elapsed())
        self._run.records.append(record)
        try:
            first = (await self._send(asked, record)).first
        finally:
            record.ended = self.elapsed()
            if record.outcome == "done":
                record.latency = record.ended - planned
                record.first_byte = None if first is None else first - self._began - planned
            self._on_record(self._run, record)
        return record.outcome

    async def _send(self, asked: Asked, record: Record) -> _Stream:
        content = json.dumps(asked.body).encode()
        while True:
            stream = _Stream(record, self._run.gaps)
            try:
                answer = await self._pool.post(content, stream.feed)
                if answer.status == 200:
                    stream.check_done()
                    record.outcome = "done"
                    return stream
            except ApiError as error:
                self._fail(record, f"error event {error.code or error.type or ''}".strip(), str(error))
            except Lost as error:
                self._fail(record, str(error).partition(":")[0], str(error))
            except BrokenOff as error:
                self._fail(record, "no whole stream", str(error))
            except ConnectionFailed as error:
                self._fail(record, "no completion", str(error))
            except TimeoutError as error:
                self._fail(record, "timeout", str(error) or "no connection in time")
            except OSError as error:
                self._fail(record, "no connection", str(error))
            except Exception as error:  # an odd answer must not lose what the others gave
                self._fail(record, "no completion", f"{type(error).__name__}: {error}")
            else:
                refused = answer.status in RETRIED and "retry-after" in answer.headers
                if refused and record.retries < self._run.plan.retries:
                    await asyncio.sleep(retry_delay(record.retries, answer.headers["retry-after"]))
                    record.retries += 1
                    continue
                code, message = _error(answer)
                self._fail(record, f"{answer.status} {code}".strip(), message)
                record.outcome = "refused" if refused else "failed"
            return stream

    def _fail(self, record: Record, kind: str, message: str) -> None:
        record.outcome, record.error = "failed", kind[:LONGEST_KIND]
        self._run.examples.setdefault(record.error, message)


def _error(answer: Answer) -> tuple[str, str]:
    """(code, message) of a refusal, whatever form it has."""
    try:
        error = json.loads(answer.body)["error"]
        return str(error.get("code") or error.get("type") or ""), str(error["message"])[:300]
    except (ValueError, LookupError, TypeError, AttributeError):
        return "", answer.body[:300].decode(errors="replace")
