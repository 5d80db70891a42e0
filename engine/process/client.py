"""The parent's side of the engine process: starts it, sends it requests, restarts it. Imports no torch.

If the process dies, a new one gets every request in flight, with the ids that arrived so far as `output_ids`, and
continues after them. The reader of a stream sees a pause, then the bytes that the first engine would have sent. An id
depends only on the ids before it and a counter-based draw. Text held back for a stop string depends only on the ids:
the engine feeds `output_ids` to its stop matcher, and releases only the text after them.
"""

import asyncio
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import suppress
from tempfile import TemporaryDirectory
from typing import Literal

import msgspec
import zmq
import zmq.asyncio

from ..config import EngineConfig, ModelLimits
from ..logs import LogSettings
from ..types import (
    Abort,
    Command,
    Delta,
    EngineInfo,
    Event,
    Failed,
    Finished,
    Request,
    Shutdown,
    Snapshot,
    TokenLogprob,
    Trace,
)
from .wire import Batch, Message, Started, StartFailed, decode_message, encode

log = logging.getLogger("fastblt.engine.client")

State = Literal["starting", "ready", "restarting", "dead"]

SETTINGS_PREFIX = "FASTBLT_"
"""Of environment variables that hold settings. The child gets its settings as arguments."""
STEADY_SECONDS = 60.0
"""A crash later than this after loading starts a new count of crashes."""
FRUITLESS_CRASHES = 2
"""Crashes in a row, without an event between them, after which a request fails."""
NAMED_REQUESTS = 8
"""Most requests named in the log line about a crash."""
HANG_TICKS = 4
STOP_SECONDS = 5.0
LAST_WORDS_SECONDS = 0.5


class EngineStartError(RuntimeError):
    """The engine process could not load its model. The message is meant for the operator."""


class EngineDead(RuntimeError):
    """The engine process has ended and will not be restarted."""


class EngineClient:
    """One engine process and the streams of its requests. Lives on one event loop.

    It restarts the process after a crash or a hang (requests in flight, and no message for `hang_timeout` seconds).
    After more than `max_restarts` crashes in a row, each within a minute of loading, it is dead.

    A new process gets the requests of the last one one after another, each once the one before has shown progress. So
    a request that crashes engines does so with few others in flight. A request that is in flight during two crashes
    without an event between them ends in `Failed`, since it is probably their cause.
    """

    limits: ModelLimits
    """Of the loaded model; not set before `start`."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        max_restarts: int = 3,
        hang_timeout: float = 120.0,
        engine_factory: str = "engine.engine:Engine",
        logs: LogSettings = LogSettings(),
    ) -> None:
        self._config = config
        self._max_restarts = max_restarts
        self._hang_timeout = hang_timeout
        self._engine_factory = engine_factory
        self._logs = logs
        self._child: _Child | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._streams: dict[str, _Stream] = {}
        self._held: deque[_Stream] = deque()
        """Streams of the last process that this one has not received yet."""
        self._probe: _Stream | None = None
        """The one that it received last; the next follows once this one shows progress."""
        self._num_messages = 0
        self.state: State = "starting"
        self.restarts = 0
        self.info = EngineInfo()
        self.snapshot = Snapshot()
        """The newest one. The counters of a restarted engine begin at 0."""

    @property
    def pid(self) -> int | None:
        """The engine process, if there is one."""
        return self._child.process.pid if self._child and self._child.process else None

    async def start(self) -> None:
        """Spawns the process and waits until the model is loaded. Raises EngineStartError."""
        try:
            await self._spawn()
        except BaseException:
            self.state = "dead"
            raise
        self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")

    async def stop(self) -> None:
        """Ends the process; streams still open raise EngineDead. May be called in any state, and again."""
        if self._supervisor:
            self._supervisor.cancel()
            await asyncio.wait({self._supervisor})
            self._supervisor = None
        patience = STOP_SECONDS if self.state == "ready" else 0
        self._send(Shutdown())
        self._die("the engine was stopped")
        await self._reap(patience)

    async def submit(self, request: Request) -> AsyncGenerator[Event, None]:
        """The events of a request, the last one a `Finished` or `Failed`. Closing the generator early aborts it.

        The first iteration sends the request to the engine. Deltas that a slow reader has not fetched are merged into
        one. `Finished.usage` only counts the work of the engine that finished the request, not of one that died.
        Raises EngineDead if the engine will not be restarted, ValueError if a request with this id is in flight.
        """
        if self.state == "dead":
            raise EngineDead("the engine is not running")
        if request.id in self._streams:
            raise ValueError(f"a request with id {request.id!r} is in flight")
        stream = self._streams[request.id] = _Stream(request)
        if self.state == "ready":
            stream.sent = True
            self._send(request)
        try:
            while True:
                event = await stream.next()
                yield event
                if not isinstance(event, Delta):
                    return
        finally:
            if self._streams.get(request.id) is stream:
                self._send(Abort(request.id))
                self._forget(stream)

    def _send(self, command: Command) -> None:
        # Not while there is no engine: a new one gets all requests in flight once it is ready. The socket has no
        # high-water mark, so a send to a running process never waits; to a dead one it is dropped with the socket.
        if self._child and self.state == "ready":
            self._child.socket.send(encode(command))

    def _forget(self, stream: "_Stream") -> None:
        del self._streams[stream.request.id]
        if stream is self._probe:
            self._resume_next()

    def _resume_next(self) -> None:
        self._probe = None
        while self._held and not self._probe:
            stream = self._held.popleft()
            if self._streams.get(stream.request.id) is stream:
                self._probe, stream.sent = stream, True
                self._send(stream.resumed())

    async def _supervise(self) -> None:
        """Receives until the process ends, restarts it, and so on until it crashes too often."""
        crashes = 0
        try:
            while True:
                loaded = time.monotonic()
                exit_code = await self._receive_until_exit()
                running = _named([stream.request for stream in self._streams.values() if stream.sent])
                log.error("the engine process %s %s %s", self.pid, _describe_exit(exit_code), running)
                crashes = 1 if time.monotonic() - loaded > STEADY_SECONDS else crashes + 1
                self.state = "restarting"
                self.snapshot = Snapshot()
                self._blame()
                while True:
                    await self._reap(0)
                    if crashes > self._max_restarts:
                        return self._die(f"the engine failed {crashes} times in a row")
                    await asyncio.sleep(0 if crashes == 1 else 0.25 * 2 ** min(crashes, 7))
                    try:
                        await self._spawn()
                        break
                    except EngineStartError as error:
                        log.error("the engine did not come back: %s", error)
                        crashes += 1
                self.restarts += 1
                log.warning("the engine is back; sequences in flight: %d", len(self._streams))
        except Exception:
            log.exception("the engine's supervisor failed")
            self._die("the engine's supervisor failed")
            await self._reap(0)

    async def _receive_until_exit(self) -> int:
        """Delivers messages until the process ends, or is killed because it hangs; returns its exit code."""
        assert self._child and self._child.process
        process, socket = self._child.process, self._child.socket
        receiver = asyncio.create_task(self._receive(socket))
        exited = asyncio.create_task(process.wait())
        # Silence is counted in ticks, not by the clock: an hour of the machine's sleep is one tick.
        received, silent_ticks = 0, 0
        try:
            while not exited.done():
                tick = self._hang_timeout / HANG_TICKS
                await asyncio.wait({receiver, exited}, timeout=tick, return_when="FIRST_COMPLETED")
                if receiver.done():
                    receiver.result()
                silent = self._streams and received == self._num_messages
                received, silent_ticks = self._num_messages, silent_ticks + 1 if silent else 0
                if silent_ticks > HANG_TICKS:
                    log.error("the engine has been silent for %g s", self._hang_timeout)
                    self._child.kill()
            return exited.result()
        finally:
            receiver.cancel()
            exited.cancel()

    async def _receive(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            message = decode_message(await socket.recv())
            self._num_messages += 1
            assert isinstance(message, Batch)
            self.snapshot = message.snapshot or self.snapshot
            for event in message.events:
                if stream := self._streams.get(event.id):
                    stream.put(event)
                    if stream.ended:
                        self._forget(stream)
                    elif stream is self._probe:
                        self._resume_next()

    def _blame(self) -> None:
        """After a crash: fails the requests that were in flight during too many crashes."""
        self._probe = None
        for stream in [stream for stream in self._streams.values() if stream.sent]:
            stream.sent = False
            stream.fruitless_crashes += 1
            if stream.fruitless_crashes == FRUITLESS_CRASHES:
                del self._streams[stream.request.id]
                message = "the engine failed repeatedly while it ran this request"
                log.error("%s; it is given up", message, extra=stream.request.log_fields)
                stream.put(Failed(id=stream.request.id, code="internal", message=message))

    def _die(self, why: str) -> None:
        self.state = "dead"
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.end(EngineDead(why))

    async def _spawn(self) -> None:
        """Starts a process, waits until it is ready, and sends it all requests in flight. Raises EngineStartError."""
        try:
            # The directory is needed until the process has connected.
            with TemporaryDirectory(prefix="fastblt-") as directory:
                self._child = _Child(f"ipc://{directory}/engine")
                await self._child.start(self._engine_factory, self._config, self._logs)
                message = await self._child.first_message()
        except (OSError, zmq.ZMQError) as error:
            await self._reap(0)
            raise EngineStartError(f"the engine process cannot be started: {error}") from error
        except BaseException:
            await self._reap(0)
            raise
        self.limits, self.info, self.snapshot = message.limits, message.info, message.snapshot
        self.state = "ready"
        self._held = deque(self._streams.values())
        self._resume_next()

    async def _reap(self, patience: float) -> None:
        if self._child:
            child, self._child = self._child, None
            await child.close(patience)


class _Child:
    """A process, the socket to it, and a pipe: when it closes, the process knows that its parent has ended."""

    def __init__(self, address: str) -> None:
        self.process: asyncio.subprocess.Process | None = None
        self._address = address
        self._context = zmq.asyncio.Context()
        self.socket = self._context.socket(zmq.PAIR)
        self.socket.set_hwm(0)
        self.socket.linger = 0
        self.socket.bind(address)
        self._lifeline: int | None = None

    async def start(self, factory: str, config: EngineConfig, logs: LogSettings) -> None:
        end, self._lifeline = os.pipe()
        try:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "engine.process.child"),
                *(self._address, str(end), factory),
                *(msgspec.json.encode(config).decode(), msgspec.json.encode(logs).decode()),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(end,),
                env=_environment(),
            )
        finally:
            os.close(end)

    async def first_message(self) -> Started:
        """Waits until the model is loaded. Raises EngineStartError."""
        assert self.process
        receiver = asyncio.ensure_future(self.socket.recv())
        exited = asyncio.create_task(self.process.wait())
        try:
            await asyncio.wait({receiver, exited}, return_when="FIRST_COMPLETED")
            if not receiver.done():
                # Its last message may still be on its way.
                await asyncio.wait({receiver}, timeout=LAST_WORDS_SECONDS)
            if not receiver.done():
                raise EngineStartError(f"the engine process {_describe_exit(exited.result())} while it was loading")
            message: Message = decode_message(receiver.result())
        finally:
            receiver.cancel()
            exited.cancel()
        if isinstance(message, StartFailed):
            raise EngineStartError(message.message)
        assert isinstance(message, Started)
        return message

    def kill(self) -> None:
        if self.process and self.process.returncode is None:
            self.process.kill()

    async def close(self, patience: float) -> None:
        """Waits up to `patience` seconds for the process to end, kills it if it has not, and frees everything."""
        try:
            if self.process:
                try:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self.process.wait(), patience)
                finally:
                    self.kill()
                await self.process.wait()
        finally:
            if self._lifeline is not None:
                os.close(self._lifeline)
            self.socket.close()
            self._context.term()


class _Stream:
    """A request in flight: the events that its reader has not fetched, and what a new engine needs to continue it."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.fruitless_crashes = 0
        self.sent = False
        """Whether the current engine has it."""
        self.ended = False
        self._submitted = time.monotonic()
        self._output_ids = list(request.output_ids)
        self._logprob = 0.0
        self._prompt_scored = False
        self._num_entropies = 0
        self._resumed = False
        self._unread = _Unread()
        self._last: Finished | Failed | EngineDead | None = None
        self._news = asyncio.Event()

    def put(self, event: Event) -> None:
        self.fruitless_crashes = 0
        if isinstance(event, Delta):
            self._output_ids += event.ids
            self._logprob += sum(entry.logprob or 0.0 for entry in event.logprobs)
            self._prompt_scored |= bool(event.prompt_logprobs)
            self._num_entropies += len(event.entropies)
            self._unread.add(event)
            self._news.set()
        elif isinstance(event, Finished) and self._resumed:
            self.end(msgspec.structs.replace(event, cumulative_logprob=self._logprob))
        else:
            self.end(event)

    def end(self, last: Finished | Failed | EngineDead) -> None:
        self.ended = True
        self._last = last
        self._news.set()

    async def next(self) -> Event:
        """The next event, or all Deltas since the last call merged into one. Raises EngineDead."""
        await self._news.wait()
        if not self._unread.empty:
            delta, self._unread = self._unread.delta(self.request.id), _Unread()
            if not self.ended:
                self._news.clear()
            return delta
        assert self._last
        if isinstance(self._last, EngineDead):
            raise self._last
        return self._last

    def resumed(self) -> Request:
        """The request for a new engine: it continues after the last event that arrived."""
        self._resumed = True
        timeout, patches_from = self.request.timeout, self.request.patches_from
        return msgspec.structs.replace(
            self.request,
            output_ids=list(self._output_ids),
            prompt_logprobs=self.request.prompt_logprobs and not self._prompt_scored,
            patches_from=None if patches_from is None else patches_from + self._num_entropies,
            timeout=None if timeout is None else max(timeout - (time.monotonic() - self._submitted), 0.0),
        )


class _Unread:
    """Deltas of one request, merged."""

    def __init__(self) -> None:
        self.empty = True
        self._ids: list[int] = []
        self._text = bytearray()
        self._logprobs: list[TokenLogprob] = []
        self._traces: list[Trace] = []
        self._prompt_logprobs: list[TokenLogprob] = []
        self._entropies: list[float] = []
        self._patch_starts: list[int] = []

    def add(self, delta: Delta) -> None:
        self.empty = False
        self._ids += delta.ids
        self._text += delta.text
        self._logprobs += delta.logprobs
        self._traces += delta.traces
        self._prompt_logprobs += delta.prompt_logprobs
        self._entropies += delta.entropies
        self._patch_starts += delta.patch_starts

    def delta(self, request_id: str) -> Delta:
        return Delta(
            id=request_id,
            ids=self._ids,
            text=bytes(self._text),
            logprobs=self._logprobs,
            traces=self._traces,
            prompt_logprobs=self._prompt_logprobs,
            entropies=self._entropies,
            patch_starts=self._patch_starts,
        )


def _environment() -> dict[str, str]:
    """The child's environment: it can import all that its parent can, however that was installed. It does not get the
    server's settings, which may include API keys."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS_PREFIX)}
    return kept | {"PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path)}


def _named(requests: list[Request]) -> str:
    """Which requests an engine was running when it died, for a log line."""
    names = list(dict.fromkeys(request.log_fields.get("request_id", request.id) for request in requests))
    more = f" and {len(names) - NAMED_REQUESTS} more" if len(names) > NAMED_REQUESTS else ""
    return f"while it ran {', '.join(names[:NAMED_REQUESTS])}{more}" if names else "while it was idle"


def _describe_exit(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL; out of memory?)"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
