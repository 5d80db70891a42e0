"""The parent's side of the engine process: starts it, sends it requests, restarts it. Imports no torch.

If the process dies, a new one gets every request in flight, with the ids that arrived so far as `output_ids`, and
continues after them. The reader of a stream sees a pause, then the bytes that the first engine would have sent. An id
depends only on the ids before it and a counter-based draw. Text held back for a stop string depends only on the ids:
the engine feeds `output_ids` to its stop matcher, and releases only the text after them.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator
from collections.abc import Sequence as Seq
from contextlib import suppress
from typing import Literal

import msgspec
import zmq

from ..config import EngineConfig, ModelLimits
from ..logs import LevelName, LogSettings
from ..shortage import flags_that_need_less
from ..types import Abort, Command, Delta, EngineInfo, Event, Failed, Request, SetLogLevel, Shutdown, Snapshot
from .heartbeat import BEAT_SECONDS
from .spawned import EngineStartError, Spawned, describe_exit
from .streams import EngineDead, Stream
from .trials import Trials
from .wire import OUT_OF_MEMORY, Batch, Scores, Started

log = logging.getLogger("fastblt.engine.client")

State = Literal["starting", "ready", "restarting", "dead"]

STEP_SECONDS = 10.0
"""What a step may take, however short the last ones were."""
DEVICE_STEP_SECONDS = 120.0
"""The same on a GPU, where kernels are compiled and recorded within steps."""
LOADING_SECONDS = 1800.0
UNREADY_BEATS = 3
"""Missed heartbeats after which requests should go to another server."""
FROZEN_BEATS = 10
"""Missed heartbeats after which the process is killed."""
FROZEN_LOADING_BEATS = 60
"""The same while it loads: importing a library may hold the interpreter."""
STEADY_SECONDS = 10.0
"""An engine that has run so long without a crash is well, even if it had nothing to do."""
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0
"""Seconds between two starts, after the first."""
TRIAL_PAUSE = 1.0
"""The longest while a request is sought that is to blame: it will crash a few more."""
SPARE_FILES = 24
"""Descriptors kept for a restart: it must not fail because connections have taken them all."""
NAMED_REQUESTS = 8
"""Most requests named in the log line about a crash."""
STOP_SECONDS = 5.0

__all__ = ["EngineClient", "EngineDead", "EngineStartError", "State"]


class EngineClient:
    """One engine process and the streams of its requests. Lives on one event loop.

    It restarts the process when that ends, freezes or takes too long for a step, again and again until it is stopped,
    with growing pauses. Which requests a new process gets and when: see `Trials`.
    """

    limits: ModelLimits
    """Of the loaded model; not set before `start`."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        engine_factory: str = "engine.engine:Engine",
        logs: LogSettings = LogSettings(),
        step_seconds: float | None = None,
        loading_seconds: float = LOADING_SECONDS,
    ) -> None:
        """step_seconds: what every step may take; a longer one may take 20 times what it should."""
        self._config = config
        self._engine_factory = engine_factory
        self._logs = logs
        on_gpu = config.device != "cpu"
        self._step_seconds = step_seconds or (DEVICE_STEP_SECONDS if on_gpu else STEP_SECONDS)
        self._loading_seconds = loading_seconds
        self._process: Spawned | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._streams: dict[str, Stream] = {}
        self._read: dict[str, Stream] = {}
        """Those whose readers have not had their last event."""
        self._trials = Trials()
        self._spares: list[int] = []
        self._failing_since: float | None = None
        self._missed_beats = 0
        self._progressed = False
        """Whether the process has told of any request."""
        self._killed = False
        """Whether the process was killed from here."""
        self.state: State = "starting"
        self.restarts = 0
        self.info = EngineInfo()
        self.snapshot = Snapshot()
        """The newest one. The counters of a restarted engine begin at 0."""

    @property
    def pid(self) -> int | None:
        """The engine process, if there is one."""
        return self._process.process.pid if self._process and self._process.process else None

    @property
    def responds(self) -> bool:
        """Whether the engine is loaded and its heart beats."""
        return self.state == "ready" and self._missed_beats < UNREADY_BEATS

    @property
    def failing_seconds(self) -> float:
        """How long no engine has made progress since one failed; 0 while all is well."""
        return 0.0 if self._failing_since is None else time.monotonic() - self._failing_since

    def down(self, patience: float) -> str | None:
        """Why no request should come, if the engine is gone or has failed for more than `patience` seconds."""
        if self.state == "dead":
            return "the engine is gone and will not come back"
        if self.failing_seconds > patience:
            return f"no engine has worked for {self.failing_seconds:.0f} s; the server goes on trying to start one"
        return None

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
        patience = STOP_SECONDS if self.responds else 0
        self._send(Shutdown())
        self._die("the engine was stopped")
        await self._reap(patience)
        self._release_spares()

    async def submit(self, request: Request, earlier: Seq[Delta] = ()) -> AsyncGenerator[Event, None]:
        """The events of a request, the last one a `Finished` or `Failed`. Closing the generator early aborts it.

        The first iteration sends the request to the engine. Deltas that a slow reader has not fetched are merged into
        one. `Finished.usage` only counts the work of the engine that finished the request, not of one that died.
        earlier: what an engine elsewhere has told of the request, which goes on after that.
        Raises EngineDead if the engine will not be restarted, ValueError if a request with this id is in flight.
        """
        if self.state == "dead":
            raise EngineDead("the engine is not running")
        if request.id in self._streams:
            raise ValueError(f"a request with id {request.id!r} is in flight")
        stream = self._streams[request.id] = self._read[request.id] = Stream(request, earlier)
        if self._trials.is_over:
            self._give(stream)
        else:
            self._give_due()
        try:
            while True:
                event = await stream.next()
                yield event
                if not isinstance(event, Delta):
                    return
        finally:
            if self._read.get(request.id) is stream:
                del self._read[request.id]
            if self._streams.get(request.id) is stream:
                self._send(Abort(request.id))
                self._forget(stream)

    def unread_bytes(self, request_id: str) -> int:
        """About what the events of a request take in memory that its reader has not passed on."""
        return self._read[request_id].unread_bytes if request_id in self._read else 0

    def set_log_level(self, level: LevelName) -> None:
        """Of the process and of those that come after it."""
        self._logs = msgspec.structs.replace(self._logs, level=level)
        self._send(SetLogLevel(level))

    def _send(self, command: Command) -> None:
        # Not while there is no engine: a new one gets all requests in flight once it is ready.
        if self._process and self.state == "ready":
            self._process.send(command)

    def _give(self, stream: Stream) -> None:
        if self.state == "ready":
            self._send(stream.send())

    def _give_due(self) -> None:
        if self.state == "ready":
            for stream in self._trials.due(self._streams.values()):
                self._give(stream)

    def _forget(self, stream: Stream) -> None:
        del self._streams[stream.request.id]
        if not self._trials.is_over:
            self._give_due()

    async def _supervise(self) -> None:
        """Receives until the process ends, restarts it, and so on."""
        failures = 0
        try:
            while True:
                exit_code = await self._receive_until_exit()
                self._note_crash(exit_code)
                failures = 0 if self._progressed else failures + 1
                while True:
                    await self._reap(0)
                    if failures:
                        longest = LONGEST_PAUSE if self._trials.is_over else TRIAL_PAUSE
                        await asyncio.sleep(min(FIRST_PAUSE * 2 ** min(failures - 1, 20), longest))
                    try:
                        await self._spawn()
                        break
                    except EngineStartError as error:
                        log.error("the engine did not come back: %s", error)
                        failures += 1
                self.restarts += 1
                log.warning("the engine is back; sequences in flight: %d", len(self._streams))
        except Exception:
            log.exception("the engine's supervisor failed")
            self._die("the engine's supervisor failed")
            await self._reap(0)

    def _note_crash(self, exit_code: int) -> None:
        running = _named([stream.request for stream in self._streams.values() if stream.sent])
        log.error("the engine process %s %s %s", self.pid, describe_exit(exit_code, self._killed), running)
        self.state, self.snapshot = "restarting", Snapshot()
        self._failing_since = self._failing_since or time.monotonic()
        for stream in self._trials.crashed(self._streams.values()):
            del self._streams[stream.request.id]
            message = "the engine failed each time that it ran this request alone"
            if exit_code == OUT_OF_MEMORY:
                message += f": it ran out of memory; {flags_that_need_less(self._config)}"
            log.error("%s; it is given up", message, extra=stream.request.log_fields)
            stream.put(Failed(id=stream.request.id, code="internal", message=message))

    async def _receive_until_exit(self) -> int:
        """Delivers messages until the process ends, or is killed because it is frozen or a step takes too long; returns
        its exit code."""
        assert self._process and self._process.process
        loaded, process = time.monotonic(), self._process
        receiver = asyncio.create_task(self._receive(process))
        exited = asyncio.create_task(self._process.process.wait())
        watch = asyncio.create_task(self._watch(process, FROZEN_BEATS))
        try:
            while not exited.done():
                steady = loaded + STEADY_SECONDS - time.monotonic()
                await asyncio.wait(
                    {receiver, exited, watch}, timeout=max(steady, 0) or None, return_when="FIRST_COMPLETED"
                )
                if receiver.done():
                    # It ends only if it fails: what such a process says next cannot be trusted.
                    self._kill(process, f"sent what cannot be read: {receiver.exception()}")
                    await exited
                elif watch.done():
                    self._kill(process, watch.result())
                    await exited
                elif time.monotonic() >= loaded + STEADY_SECONDS:
                    self._note_progress()
            return exited.result()
        finally:
            for task in (receiver, exited, watch):
                task.cancel()

    def _kill(self, process: Spawned, why: str) -> None:
        log.error("the engine process %s %s; it is killed", self.pid, why)
        self._killed = True
        process.kill()

    async def _watch(self, process: Spawned, most: int) -> str:
        """Returns once the process must be killed, and why."""
        beats = process.beats
        self._missed_beats = 0
        while self._missed_beats < most:
            await asyncio.sleep(BEAT_SECONDS)
            self._missed_beats = self._missed_beats + 1 if process.beats == beats else 0
            beats = process.beats
            if process.is_stuck:
                return "takes too long for a step"
        return f"has shown no life for {most * BEAT_SECONDS:g} s"

    async def _receive(self, process: Spawned) -> None:
        while True:
            message = await process.receive()
            if isinstance(message, Scores):
                if stream := self._streams.get(message.id):
                    stream.score(message.entries)
                # The next message may be here already, and `receive` would not wait.
                await asyncio.sleep(0)
                continue
            assert isinstance(message, Batch)
            self.snapshot = message.snapshot or self.snapshot
            if message.events:
                self._note_progress()
            for event in message.events:
                if stream := self._streams.get(event.id):
                    was_silent = stream.silent
                    stream.put(event)
                    if stream.ended:
                        self._forget(stream)
                    elif was_silent and not self._trials.is_over:
                        self._give_due()

    def _give_up_begun(self) -> None:
        """Fails requests with output: the new engine has another model, which would write another text."""
        log.warning("the checkpoint has changed; requests that have output are given up")
        for stream in [one for one in self._streams.values() if one.has_output]:
            del self._streams[stream.request.id]
            message = "the engine had to restart, and its checkpoint had been replaced; send the request again"
            stream.put(Failed(id=stream.request.id, code="internal", message=message))

    def _note_progress(self) -> None:
        self._progressed, self._failing_since = True, None

    def _die(self, why: str) -> None:
        self.state = "dead"
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.end(EngineDead(why))

    async def _spawn(self) -> None:
        """Starts a process, waits until it is ready, and sends it the requests in flight. Raises EngineStartError."""
        self._release_spares()
        try:
            process = self._process = Spawned()
            await process.start(self._engine_factory, self._config, self._logs, self._step_seconds)
            self._keep_spares()
            message = await self._first_message(process)
            self._release_spares()
            process.forget_address()
            self._keep_spares()
        except (OSError, zmq.ZMQError) as error:
            await self._reap(0)
            raise EngineStartError(f"the engine process cannot be started: {error}") from error
        except BaseException:
            await self._reap(0)
            raise
        if self.state == "restarting" and message.limits.fingerprint != self.limits.fingerprint:
            self._give_up_begun()
        self.limits, self.info, self.snapshot = message.limits, message.info, message.snapshot
        self.state, self._progressed, self._killed = "ready", False, False
        # It may have changed while the process loaded.
        self._send(SetLogLevel(self._logs.level))
        self._give_due()

    async def _first_message(self, process: Spawned) -> Started:
        """Raises EngineStartError."""
        first = asyncio.create_task(process.first_message())
        watch = asyncio.create_task(self._watch(process, FROZEN_LOADING_BEATS))
        try:
            await asyncio.wait({first, watch}, timeout=self._loading_seconds, return_when="FIRST_COMPLETED")
            if first.done():
                return first.result()
            why = watch.result() if watch.done() else f"has not loaded its model within {self._loading_seconds:g} s"
            raise EngineStartError(f"the engine process {why}")
        finally:
            for task in (first, watch):
                task.cancel()
            with suppress(asyncio.CancelledError, EngineStartError):
                await first

    async def _reap(self, patience: float) -> None:
        if self._process:
            self._release_spares()
            process, self._process = self._process, None
            await process.close(patience)

    def _keep_spares(self) -> None:
        with suppress(OSError):
            while len(self._spares) < SPARE_FILES:
                self._spares.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))

    def _release_spares(self) -> None:
        while self._spares:
            os.close(self._spares.pop())


def _named(requests: list[Request]) -> str:
    """Which requests an engine was running when it died, for a log line."""
    names = list(dict.fromkeys(request.log_fields.get("request_id", request.id) for request in requests))
    more = f" and {len(names) - NAMED_REQUESTS} more" if len(names) > NAMED_REQUESTS else ""
    return f"while it ran {', '.join(names[:NAMED_REQUESTS])}{more}" if names else "while it was idle"
