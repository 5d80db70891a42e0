"""The engine process, started by `engine.process.client`.

    python -m engine.process.child ADDRESS LIFELINE HEART STEP_SECONDS FACTORY CONFIG LOGS

It connects to the ZeroMQ address, loads the engine (`FACTORY` is "module:callable", `CONFIG` an EngineConfig and `LOGS`
LogSettings as JSON) and steps it as long as there is work. Exit codes: 0 if asked to end, 1 if it failed,
`wire.OUT_OF_MEMORY`. LIFELINE is the reading end of a pipe whose other end only the parent holds: when the parent ends,
the pipe closes and this process ends too. HEART is the writing end of another, see `engine.process.heartbeat`.
"""

import gc
import logging
import os
import signal
import sys
import threading
import time
from importlib import import_module
from typing import Protocol

import msgspec
import zmq

from .. import logs
from ..config import EngineConfig, ModelLimits
from ..shortage import flags_that_need_less, is_out_of_memory
from ..types import Abort, EngineInfo, Event, Request, SetLogLevel, Shutdown, Snapshot
from .heartbeat import Heart
from .wire import OUT_OF_MEMORY, Message, Started, StartFailed, decode_command, encode, messages

log = logging.getLogger("fastblt.engine.process")

COMMANDS_SECONDS = 0.01
"""After so long the next commands wait for a step if there is work, so that many new requests stall no stream."""
SNAPSHOT_INTERVAL = 0.1
"""Least seconds between two snapshots while there is work."""
FIRST_LINES_SECONDS = 0.5
"""Longest wait for log lines to be written before the first message is sent."""
LINGER_MS = 2000
"""How long a process that ends tries to deliver its last message."""


class EngineLike(Protocol):
    """What the loop needs of an engine; see `engine.engine.Engine`."""

    @property
    def limits(self) -> ModelLimits: ...

    @property
    def has_work(self) -> bool: ...

    def calibrate(self) -> None: ...

    def info(self) -> EngineInfo: ...

    def add(self, request: Request) -> None: ...

    def abort(self, request_id: str) -> None: ...

    def step(self) -> list[Event]: ...

    def step_bound(self) -> float: ...

    def snapshot(self) -> Snapshot: ...

    def close(self) -> None: ...


def main(
    address: str, lifeline: str, pipe: str, step_seconds: str, factory: str, config: str, log_settings: str
) -> int:
    """Loads, serves and returns the exit code."""
    # Libraries make a million objects that stay: collections that scan them again and again take a third of the load.
    gc.disable()
    # Ctrl-C reaches the whole group; only the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    threading.Thread(target=_leave_with_parent, args=(int(lifeline),), daemon=True).start()
    heart = Heart(int(pipe), float(step_seconds))
    logs.configure(msgspec.json.decode(log_settings, type=logs.LogSettings), "engine")
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.set_hwm(0)
        socket.linger = LINGER_MS
        socket.connect(address)

        def send(message: Message) -> None:
            # The parent logs this message, or ends this process at once. Lines logged before it should come first.
            logs.flush(FIRST_LINES_SECONDS)
            socket.send(encode(message))

        began = time.monotonic()
        try:
            settings = msgspec.json.decode(config, type=EngineConfig)
            module, name = factory.split(":")
            build = getattr(import_module(module), name)
            gc.freeze()
            gc.enable()
            engine: EngineLike = build(settings)
            engine.calibrate()
            limits, info = engine.limits, engine.info()
        except Exception as error:
            log.debug("loading failed", exc_info=True)
            send(StartFailed(_describe(error)))
            return 1
        log.info(
            "loaded %s in %.1f s: %s parameters, %s weights on %s",
            *(limits.name, time.monotonic() - began, f"{limits.parameters:,}", info.weights, info.device),
        )
        send(Started(limits, info, _snapshot(engine)))
        # What was loaded stays: without this every garbage collection would scan all of it.
        gc.collect()
        gc.freeze()
        try:
            _serve(engine, socket, heart)
        except Exception as error:
            if is_out_of_memory(error):
                log.exception("out of memory in a step; the process ends: %s", flags_that_need_less(settings))
                return OUT_OF_MEMORY
            log.exception("the engine failed; its process ends")
            return 1
        finally:
            engine.close()
    return 0


def _serve(engine: EngineLike, socket: zmq.Socket[bytes], heart: Heart) -> None:
    """Steps the engine until Shutdown; sleeps while there is nothing to do."""
    reported = time.monotonic()
    while True:
        if not engine.has_work:
            socket.poll()
        began = time.monotonic()
        while socket.poll(0):
            match decode_command(socket.recv()):
                case Request() as request:
                    engine.add(request)
                case Abort(id):
                    engine.abort(id)
                case SetLogLevel(level):
                    logs.set_level(level)
                case Shutdown():
                    return
            if engine.has_work and time.monotonic() - began >= COMMANDS_SECONDS:
                break
        if not engine.has_work:
            continue
        events = heart.step(engine.step, engine.step_bound)
        now = time.monotonic()
        due = not engine.has_work or now - reported >= SNAPSHOT_INTERVAL
        if due:
            reported = now
        if events or due:
            for message in messages(events, _snapshot(engine) if due else None):
                socket.send(encode(message))


def _snapshot(engine: EngineLike) -> Snapshot:
    """The engine's, with the count of dropped log lines, which only the process knows."""
    return msgspec.structs.replace(engine.snapshot(), dropped_log_lines=logs.dropped())


def _leave_with_parent(lifeline: int) -> None:
    os.set_inheritable(lifeline, False)
    os.read(lifeline, 1)
    os._exit(0)


def _describe(error: Exception) -> str:
    """One message for a person. An error about the input is given as it is, any other with its type."""
    if str(error) and isinstance(error, (ValueError, OSError)):
        return str(error)
    return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    exit_code = main(*sys.argv[1:])
    logs.flush()
    # Python would first take all libraries apart, for seconds in which nothing more can happen.
    os._exit(exit_code)
