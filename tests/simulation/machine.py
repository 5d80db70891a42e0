"""An engine's process on the virtual clock: the real engine and its messages, without stages, sockets and a process.

It takes the place of `engine.process.spawned.Spawned`.
"""

import asyncio
import itertools
import random
import signal
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from engine import build
from engine.config import EngineConfig
from engine.costs.ledger import Ledger
from engine.decoders import Draft, Next, Result, Unmask, Verify
from engine.engine import Engine
from engine.logs import LogSettings
from engine.process.heartbeat import BEAT_SECONDS
from engine.process.spawned import EngineStartError
from engine.process.wire import Batch, Message, Started, StartFailed, decode_command, decode_message, encode
from engine.rows import Rows
from engine.step.step import Stepper
from engine.types import Abort, Command, EngineInfo, Request, SetLogLevel, Shutdown
from tests.engines import save_ours
from tests.models import our_config, our_model

from .text import guess_of, output_of, starts_patch
from .turns import Turns

STEP_SECONDS, ROW_SECONDS = 0.004, 0.0001
"""Of a step, and of each of its rows."""
STUCK_SECONDS = 10_000.0
LONGEST_PATCH = 8
CHECKED_EVERY = 64
"""Steps after which all pages are counted."""
_pids = itertools.count(1)


class StepClock:
    """seconds: what has passed for the engine whose step runs: the loop's clock stands still meanwhile."""

    seconds = 0.0


step_clock = StepClock()


@dataclass
class Faults:
    """What goes wrong on the machine, now.

    unstartable: how a process fails to start. frozen: none of its threads runs. poison: ids of requests that end the
    process whose step has their rows. stuck: the next step does not end; stuck_since: when the last such began.
    crashes, ready: when processes ended and were ready. errors: of engines themselves.
    """

    draw: random.Random
    unstartable: str | None = None
    frozen: bool = False
    stuck: bool = False
    stuck_since: float = 0.0
    poison: set[str] = field(default_factory=set)
    crashes: list[float] = field(default_factory=list)
    ready: list[float] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    trace: list[str] = field(default_factory=list)

    def note(self, what: str) -> None:
        self.trace.append(f"{asyncio.get_running_loop().time():.6f} {what}")


class ScriptedStepper(Stepper):
    """Gives the text of `.text` instead of running stages."""

    ledger: Ledger

    def run(self, batch: Seq[Rows]) -> Seq[Result | None]:
        self._charge(batch)
        return [self._result(rows) for rows in batch]

    def _charge(self, batch: Seq[Rows]) -> None:
        """The step's time, to the sequences that generate by their rows."""
        num_rows = sum(rows.num_rows for rows in batch)
        seconds = STEP_SECONDS + ROW_SECONDS * num_rows
        step_clock.seconds += seconds
        self.ledger.total.seconds["decoder"] += seconds
        for rows in batch:
            if rows.ask is not None:
                share = seconds * rows.num_rows / num_rows
                self.ledger.decoders[rows.sequence.request.decoder].seconds["decoder"] += share

    def _result(self, rows: Rows) -> Result | None:
        sequence, request, place = rows.sequence, rows.sequence.request, rows.sequence.num_output
        self._text_slots.take(sequence)
        decided = sequence.patching.decided
        if decided < rows.end:
            opens = [starts_patch(row + 1, LONGEST_PATCH) for row in range(decided, rows.end)]
            sequence.decide([1.0] * len(opens), opens)
        own = output_of(request)
        match rows.ask:
            case Next():
                return Result([own[place]])
            case Draft(known):
                return Result([guess_of(request, place + len(known))])
            case Unmask(block):
                places = range(place, place + len(block))
                exact = request.decoder == "blt-d"
                ids = [own[p] if exact else guess_of(request, p) for p in places]
                return Result(ids, settled=[0] * len(block))
            case Verify(drafts):
                right = 0
                while right < len(drafts) and drafts[right] == own[place + right]:
                    right += 1
                return Result([own[place + right]], right)
        return None


@cache
def _parts(cache_bytes: int, max_sequences: int) -> tuple[EngineConfig, build.Parts]:
    """Built once: a new process has the same."""
    config = replace(our_config(decoder_input="embedding", mask_id=260, block_size=6), name="simulated")
    with TemporaryDirectory() as folder:
        path = save_ours(Path(folder) / "model", our_model(config))
        chosen = EngineConfig(
            model=str(path), cache_bytes=cache_bytes, page_size=16, max_sequences=max_sequences, max_length=4096,
            max_step_rows=256,
        )  # fmt: skip
        parts = build.build(chosen)
    stepper = ScriptedStepper(parts.stepper.stages, parts.memory, parts.ledger, parts.kernels, "never")
    stepper.ledger = parts.ledger
    return chosen, replace(parts, stepper=stepper)


def config_of(cache_bytes: int, max_sequences: int) -> EngineConfig:
    return _parts(cache_bytes, max_sequences)[0]


def parts_of(config: EngineConfig) -> build.Parts:
    """In place of `engine.build.build`."""
    assert config.cache_bytes
    return _parts(config.cache_bytes, config.max_sequences)[1]


class _Process:
    """What asyncio gives of a child."""

    def __init__(self, when_ended: Callable[[int], None]) -> None:
        self.pid, self._when_ended = next(_pids), when_ended
        self.returncode: int | None = None
        self._ended = asyncio.Event()

    async def wait(self) -> int:
        await self._ended.wait()
        assert self.returncode is not None
        return self.returncode

    def end(self, code: int) -> None:
        if self.returncode is None:
            self.returncode = code
            self._ended.set()
            self._when_ended(code)

    def kill(self) -> None:
        self.end(-signal.SIGKILL)


class Machine:
    """Where processes run. At most one is alive; it holds the caches."""

    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self.process: SimulatedProcess | None = None
        self.engine: Engine | None = None

    def spawn(self) -> "SimulatedProcess":
        """In place of `Spawned`."""
        self.process = SimulatedProcess(self)
        return self.process

    def kill(self) -> None:
        if self.process:
            self.process.kill()

    def forget(self) -> None:
        """Frees the memory of a process that has ended."""
        if not self.engine:
            return
        self.engine.reset()
        while self.engine.memory.prefixes and self.engine.memory.prefixes.forget():
            pass
        pools = self.engine.memory.caches.pools.values()
        assert all(pool.num_free == pool.num_total for pool in pools), "pages are lost"


class SimulatedProcess:
    def __init__(self, machine: Machine) -> None:
        self.process: _Process | None = None
        self.beats = 0
        self.is_stuck = False
        self._machine, self._faults = machine, machine.faults
        self._commands: asyncio.Queue[bytes] = asyncio.Queue()
        self._messages: asyncio.Queue[bytes] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._step_began: float | None = None

    # What the parent calls.

    async def start(self, factory: str, config: EngineConfig, logs: LogSettings, step_seconds: float) -> None:
        if self._faults.unstartable == "descriptors":
            raise OSError(24, "Too many open files")
        self.process = _Process(self._end)
        self._faults.note("spawned")
        self._tasks = [
            asyncio.create_task(self._live(config, self.process)),
            asyncio.create_task(self._beat(self.process, step_seconds)),
        ]

    async def first_message(self) -> Started:
        assert self.process
        message = asyncio.create_task(self._messages.get())
        ended = asyncio.create_task(self.process.wait())
        try:
            await asyncio.wait({message, ended}, return_when="FIRST_COMPLETED")
            if not message.done():
                raise EngineStartError("the engine process ended while it was loading")
            first = decode_message(message.result())
        finally:
            message.cancel()
            ended.cancel()
        if isinstance(first, StartFailed):
            raise EngineStartError(first.message)
        assert isinstance(first, Started)
        self._faults.ready.append(asyncio.get_running_loop().time())
        return first

    def forget_address(self) -> None: ...

    async def receive(self) -> Message:
        return decode_message(await self._messages.get())

    def send(self, command: Command) -> None:
        self._commands.put_nowait(encode(command))

    def kill(self) -> None:
        if self.process:
            self.process.kill()

    async def close(self, patience: float) -> None:
        if self.process:
            try:
                await asyncio.wait_for(self.process.wait(), patience)
            except TimeoutError:
                self.kill()
            await self.process.wait()

    # What the process does.

    async def _thawed(self) -> None:
        while self._faults.frozen:  # noqa: ASYNC110
            await asyncio.sleep(0.05)

    async def _beat(self, process: _Process, step_seconds: float) -> None:
        """As `engine.process.heartbeat`, whose thread sleeps on the real clock."""
        loop = asyncio.get_running_loop()
        while process.returncode is None:
            await self._thawed()
            self.beats += 1
            took = 0.0 if self._step_began is None else loop.time() - self._step_began
            self.is_stuck = took > step_seconds
            await asyncio.sleep(BEAT_SECONDS)

    def _end(self, code: int) -> None:
        self._faults.crashes.append(asyncio.get_running_loop().time())
        self._faults.note(f"ended {code}")
        self._faults.frozen = False
        for task in self._tasks:
            task.cancel()
        # What it has sent may be lost with it.
        left = [self._messages.get_nowait() for _ in range(self._messages.qsize())]
        for message in left[: self._faults.draw.randint(0, len(left))]:
            self._messages.put_nowait(message)

    async def _live(self, config: EngineConfig, process: _Process) -> None:
        await asyncio.sleep(self._faults.draw.uniform(0.2, 2.0))
        await self._thawed()
        if self._faults.unstartable == "model":
            self._messages.put_nowait(encode(StartFailed("the model is not there")))
            return process.end(1)
        if self._faults.unstartable == "ends":
            return process.end(-signal.SIGKILL)
        self._machine.forget()
        engine = self._machine.engine = Engine(config)
        Turns(engine._scheduler)
        self._messages.put_nowait(encode(Started(engine.limits, EngineInfo(), engine.snapshot())))
        try:
            await self._serve(engine, process)
        except Exception as error:
            self._faults.errors.append(error)
            process.end(1)

    async def _serve(self, engine: Engine, process: _Process) -> None:
        """As `engine.process.child`."""
        steps = 0
        while True:
            if not engine.has_work:
                check_idle(engine)
                if self._take(engine, await self._commands.get()):
                    return process.end(0)
            await self._thawed()
            while not self._commands.empty():
                if self._take(engine, self._commands.get_nowait()):
                    return process.end(0)
            if not engine.has_work:
                continue
            self._step_began = asyncio.get_running_loop().time()
            if self._faults.stuck:
                self._faults.stuck, self._faults.stuck_since = False, self._step_began
                await asyncio.sleep(STUCK_SECONDS)
            events = engine.step()
            step_clock.seconds = 0.0
            rows = sum(rows.num_rows for rows in engine._batch)
            await asyncio.sleep(STEP_SECONDS + ROW_SECONDS * rows)
            if self._faults.poison and any(r.sequence.request.id in self._faults.poison for r in engine._batch):
                return process.end(-signal.SIGSEGV)
            await self._thawed()
            self._step_began = None
            steps += 1
            if not steps % CHECKED_EVERY:
                engine.memory.caches.check_integrity()
            done = not engine.has_work
            if events or done:
                self._messages.put_nowait(encode(Batch(events, engine.snapshot() if done else None)))
            # The parent runs in a process of its own.
            await asyncio.sleep(0)

    def _take(self, engine: Engine, command: bytes) -> bool:
        """Whether it is the last."""
        match decode_command(command):
            case Request() as request:
                engine.add(request)
            case Abort(id):
                engine.abort(id)
            case SetLogLevel():
                pass
            case Shutdown():
                return True
        return False


def check_idle(engine: Engine) -> None:
    """No sequence, so no page in use."""
    assert not any(pool.num_used for pool in engine.memory.caches.pools.values()), "pages are lost"
