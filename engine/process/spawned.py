"""One engine process as its parent sees it: its start, its messages, its heartbeat, its end."""

import asyncio
import os
import signal
import sys
from contextlib import suppress
from tempfile import TemporaryDirectory

import msgspec
import zmq
import zmq.asyncio

from ..config import EngineConfig
from ..logs import LogSettings
from ..types import Command
from .heartbeat import STUCK
from .wire import OUT_OF_MEMORY, Message, Started, StartFailed, decode_message, encode

SETTINGS_PREFIX = "FASTBLT_"
"""Of environment variables that hold settings. The child gets its settings as arguments."""
LAST_WORDS_SECONDS = 0.5
BEATS_READ = 4096


class EngineStartError(RuntimeError):
    """The engine process could not load its model. The message is meant for the operator."""


class Spawned:
    """A process, the socket to it, and two pipes: through one it sends its heartbeat, and when the other closes, it
    knows that its parent has ended."""

    def __init__(self) -> None:
        self.process: asyncio.subprocess.Process | None = None
        self.beats = 0
        """How many have come."""
        self.is_stuck = False
        """Whether it says that a step takes too long."""
        self._directory = TemporaryDirectory(prefix="fastblt-")
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.linger = 0
        self._lifeline: int | None = None
        self._heart: int | None = None

    async def start(self, factory: str, config: EngineConfig, logs: LogSettings, step_seconds: float) -> None:
        """Raises OSError and zmq.ZMQError."""
        address = f"ipc://{self._directory.name}/engine"
        self._socket.bind(address)
        end, self._lifeline = os.pipe()
        self._heart, beats = os.pipe()
        os.set_blocking(self._heart, False)
        asyncio.get_running_loop().add_reader(self._heart, self._read_beats)
        try:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "engine.process.child"),
                *(address, str(end), str(beats), str(step_seconds), factory),
                *(msgspec.json.encode(config).decode(), msgspec.json.encode(logs).decode()),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(end, beats),
                env=_environment(),
            )
        finally:
            os.close(end)
            os.close(beats)

    async def first_message(self) -> Started:
        """Waits until the model is loaded. Raises EngineStartError."""
        assert self.process
        receiver = asyncio.ensure_future(self._socket.recv())
        exited = asyncio.create_task(self.process.wait())
        try:
            await asyncio.wait({receiver, exited}, return_when="FIRST_COMPLETED")
            if not receiver.done():
                # Its last message may still be on its way.
                await asyncio.wait({receiver}, timeout=LAST_WORDS_SECONDS)
            if not receiver.done():
                raise EngineStartError(f"the engine process {describe_exit(exited.result())} while it was loading")
            message = decode_message(receiver.result())
        except ValueError as error:
            raise EngineStartError(f"the engine process sent what cannot be read: {error}") from error
        finally:
            receiver.cancel()
            exited.cancel()
        if isinstance(message, StartFailed):
            raise EngineStartError(message.message)
        assert isinstance(message, Started)
        return message

    def forget_address(self) -> None:
        """Once the process has connected."""
        self._directory.cleanup()

    async def receive(self) -> Message:
        """The next message."""
        return decode_message(await self._socket.recv())

    def send(self, command: Command) -> None:
        """Never waits: the socket has no high-water mark. To a dead process it is dropped with the socket."""
        self._socket.send(encode(command))

    def kill(self) -> None:
        """Ends it at once, even if it is stopped."""
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
            if self._heart is not None:
                asyncio.get_running_loop().remove_reader(self._heart)
                os.close(self._heart)
            if self._lifeline is not None:
                os.close(self._lifeline)
            self._socket.close()
            self._context.term()
            self._directory.cleanup()

    def _read_beats(self) -> None:
        assert self._heart is not None
        with suppress(BlockingIOError):
            if not (beats := os.read(self._heart, BEATS_READ)):
                # The process has ended.
                asyncio.get_running_loop().remove_reader(self._heart)
                return
            self.beats += len(beats)
            self.is_stuck = beats.endswith(STUCK)


def _environment() -> dict[str, str]:
    """The child's environment: it can import all that its parent can, however that was installed. It does not get the
    server's settings, which may include API keys."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS_PREFIX)}
    return kept | {"PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path)}


def describe_exit(code: int, killed_here: bool = False) -> str:
    """For a log line: "the engine process ..."."""
    if code == -signal.SIGKILL:
        return "was killed by the server" if killed_here else "was killed (SIGKILL; out of memory?)"
    if code == OUT_OF_MEMORY:
        return "ran out of memory"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
