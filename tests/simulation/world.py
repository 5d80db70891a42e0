"""Client, scheduler and engine on a virtual clock, under every kind of fault, all drawn from one seed.

After every event: a stream's bytes are a prefix of what it should get; no innocent request fails; deadlines are kept;
short texts do not wait for long ones after a crash; nothing that was accepted is lost; no page is.
"""

import asyncio
import logging
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, aclosing
from dataclasses import dataclass, field
from hashlib import sha256
from unittest import mock

import msgspec

from engine.config import BYTE_OFFSET, EngineConfig
from engine.process import client
from engine.process.client import EngineClient
from engine.process.streams import GRACE_SECONDS, EngineDead
from engine.types import Delta, Failed, Finished, Request, SamplingParams, UnmaskRule

from .loop import run, virtual_time
from .machine import ROW_SECONDS, Faults, Machine, config_of, parts_of
from .text import expected

SETTLE_SECONDS = 240.0
"""How long after the last arrival and the last fault all requests must have ended, poisoned ones too."""
LATE_SECONDS = 0.02
"""What a deadline may be missed by, besides the grace of the engine."""
STEP_LATE_SECONDS = 0.1
"""What it may be missed by before anything has gone wrong: the step that runs, and what is on its way."""
EARLY_SECONDS = 1e-6
"""What rounding may make a deadline come too early by."""
SHORT = 200
"""Ids of a text that is read again within a step."""
RESUMED_SECONDS = 0.3
"""How long after an engine is ready a stream with a short text may be silent, besides four times what it takes to read
all short texts."""


Plant = Callable[[], AbstractContextManager[object]]


class Violation(AssertionError):
    """An invariant does not hold."""


@dataclass
class Story:
    """What a seed makes of a run. All times in seconds."""

    seed: int
    num_requests: int = 200
    draw: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.draw = draw = random.Random(self.seed)
        self.max_sequences = draw.choice([4, 16, 64])
        self.cache_bytes = draw.choice([4, 16, 64]) << 20
        self.span = self.num_requests * draw.choice([0.005, 0.02, 0.1])
        self.fills_steps = self.seed % 8 == 7
        """Whether those that generate need more rows than a step has."""
        if self.fills_steps:
            self.max_sequences, self.cache_bytes, self.span = 64, 64 << 20, self.num_requests * 0.005
        self.num_poisoned = draw.choice([0, 0, 1, 3])
        kinds = ["kill", "kill twice", "freeze", "pause", "stuck", "model", "descriptors", "ends"]
        count = draw.randint(0, 6)
        self.faults = sorted((draw.uniform(0, self.span), draw.choice(kinds)) for _ in range(count))

    def request(self, number: int) -> Request:
        draw = self.draw
        length = draw.choice([1, 5, 20, 60, 60, 150, draw.choice([400, 2000])])
        few = [BYTE_OFFSET + draw.randrange(3) for _ in range(6)]
        prompt = [draw.choice(few) for _ in range(length)] if draw.random() < 0.3 else few * (length // 6 + 1)
        decoder = draw.choice(["blt", "blt-s", "blt-d", "blt-dv"])
        request = Request(
            id=str(number),
            prompt_ids=prompt[:length],
            max_tokens=draw.choice([1, 4, 12, 40, 100]),
            sampling=SamplingParams(seed=draw.randrange(1 << 32)),
            stop=[bytes([draw.randrange(256)]) for _ in range(draw.choice([0, 0, 0, 2]))],
            decoder=decoder,  # type: ignore[arg-type]
            unmask=UnmaskRule(rule="one_step") if decoder == "blt-d" else None,
            priority=draw.choice([0, 0, 0, -1, 1]),
            timeout=draw.choice([None, None, None, draw.uniform(0.05, 20.0)]),
        )
        if not self.fills_steps:
            return request
        return msgspec.structs.replace(
            request,
            prompt_ids=prompt[:20],
            max_tokens=100,
            stop=[],
            decoder="blt-d",
            unmask=UnmaskRule(rule="one_step"),
        )


class Heard:
    """What a client has got, held against what it should get."""

    def __init__(self, request: Request, began: float, *, is_slow: bool) -> None:
        """is_slow: whether it reads late, so that its times say nothing."""
        self.request, self.want, self.began, self.is_slow = request, expected(request), began, is_slow
        self.ids, self.text = list[int](), b""

    def take(self, event: Delta | Finished, now: float, *, is_harmed: bool) -> None:
        """is_harmed: whether something has gone wrong, so that its engine may be away. Raises Violation."""
        name, want = self.request.id, self.want
        self.text += event.text
        if not want.text.startswith(self.text):
            raise Violation(f"{name} got {self.text!r} instead of {want.text!r}")
        if isinstance(event, Delta):
            self.ids += event.ids
            if tuple(self.ids) != want.ids[: len(self.ids)]:
                raise Violation(f"{name} got ids {self.ids} instead of {want.ids}")
            return
        if event.reason == "timeout":
            if self.request.timeout is None or now - self.began < self.request.timeout - EARLY_SECONDS:
                raise Violation(f"{name} ended at a deadline that it does not have, or has later")
        elif (event.reason, self.text, tuple(self.ids)) != (want.reason, want.text, want.ids):
            raise Violation(f"{name} ended by {event.reason} with {self.text!r}, not {want}")
        if self.request.timeout is not None and not self.is_slow:
            late = now - self.began - self.request.timeout
            if late > (GRACE_SECONDS + LATE_SECONDS if is_harmed else STEP_LATE_SECONDS):
                raise Violation(f"{name} ended {late:.3f} s after its deadline")


class World:
    """All that a story happens to."""

    def __init__(self, story: Story, config: EngineConfig) -> None:
        self.story, self.draw = story, story.draw
        self.faults = Faults(story.draw)
        self.machine = Machine(self.faults)
        self.config = config
        self.failed, self.left = set[str](), set[str]()
        self.crowded = 0.0
        """When there were last more streams than places."""
        self.is_harmed = False
        """Whether a fault of the story has begun."""

    async def play(self) -> None:
        story = self.story
        loop = asyncio.get_running_loop()
        self.client = EngineClient(self.config, step_seconds=10.0, loading_seconds=60.0)
        await self.client.start()
        start = loop.time()
        requests = [(story.draw.uniform(0, story.span), story.request(n)) for n in range(story.num_requests)]
        self.faults.poison = {r.id for _, r in story.draw.sample(requests, min(story.num_poisoned, len(requests)))}
        streams = [asyncio.create_task(self._stream(start + at, request)) for at, request in requests]
        harm = asyncio.create_task(self._harm(start))
        await asyncio.wait({harm, *streams}, timeout=story.span + 120.0, return_when="FIRST_EXCEPTION")
        left = {task for task in streams if not task.done()}
        if left and not any(task.done() and task.exception() for task in (harm, *streams)):
            await asyncio.wait({harm, *left}, timeout=SETTLE_SECONDS, return_when="FIRST_EXCEPTION")
        self._raise_own()
        for task in (harm, *streams):
            if task.done():
                task.result()
        if never := [str(n) for n, task in enumerate(streams) if not task.done()]:
            raise Violation(f"{len(never)} requests never ended: {', '.join(never[:8])}")
        await self.client.stop()
        self._raise_own()
        if missing := self.faults.poison - self.failed - self.left:
            raise Violation(f"poisoned requests ended well: {missing}")

    def _raise_own(self) -> None:
        """What an engine raised, which has caused all else."""
        if self.faults.errors:
            raise self.faults.errors[0]

    async def _harm(self, start: float) -> None:
        loop = asyncio.get_running_loop()
        faults, draw = self.faults, self.draw
        for at, kind in self.story.faults:
            await asyncio.sleep(max(start + at - loop.time(), 0))
            faults.note(kind)
            self.is_harmed = True
            if kind.startswith("kill"):
                self.machine.kill()
                if kind == "kill twice":
                    await asyncio.sleep(draw.uniform(0, 4))
                    self.machine.kill()
            elif kind in ("freeze", "pause"):
                faults.frozen = True
                if kind == "pause":
                    await asyncio.sleep(draw.uniform(0.1, 8.0))
                    faults.frozen = False
            elif kind == "stuck":
                faults.stuck = True
            else:
                faults.unstartable = kind
                self.machine.kill()
                await asyncio.sleep(draw.uniform(1, 40))
                faults.unstartable = None

    async def _stream(self, at: float, request: Request) -> None:
        loop, draw = asyncio.get_running_loop(), self.draw
        await asyncio.sleep(max(at - loop.time(), 0))
        heard = Heard(request, loop.time(), is_slow=draw.random() < 0.1)
        leaves = draw.choice([None] * 9 + [draw.randint(0, len(heard.want.ids))])
        last = loop.time(), len(self.faults.crashes)
        try:
            async with aclosing(self.client.submit(request)) as events:
                async for event in events:
                    now = loop.time()
                    self.faults.note(f"{request.id} {type(event).__name__} {len(heard.ids)}")
                    if isinstance(event, Failed):
                        if request.id not in self.faults.poison:
                            raise Violation(f"{request.id} failed, though it is innocent: {event.message}")
                        self.failed.add(request.id)
                        return
                    heard.take(event, now, is_harmed=self.is_harmed or bool(self.faults.crashes))
                    if not heard.is_slow:
                        self._check_pause(request, len(heard.ids), last, now)
                    last = now, len(self.faults.crashes)
                    has_left = leaves is not None and len(heard.ids) >= leaves
                    if has_left or (isinstance(event, Finished) and event.reason == "timeout"):
                        self.left.add(request.id)
                    if has_left or isinstance(event, Finished):
                        return
                    if heard.is_slow:
                        await asyncio.sleep(draw.uniform(0, 0.5))
        except EngineDead as error:
            raise Violation(f"{request.id} was given up with the engine: {error}") from error
        raise Violation(f"{request.id} ended without a last event")

    def _check_pause(self, request: Request, num_ids: int, last: tuple[float, int], now: float) -> None:
        """After one crash, a short text must not wait until long ones have been read again. last: when the event before
        came, and the crashes until then."""
        since, crashes = last
        streams = self.client._streams.values()
        if len(streams) > self.config.max_sequences:
            self.crowded = now
        length = len(request.prompt_ids) + num_ids
        if len(self.faults.crashes) != crashes + 1 or length > SHORT or request.priority > 0:
            return
        ready = self.faults.ready[-1]
        if ready < self.faults.crashes[-1] or since > ready or self.faults.frozen or self.faults.poison:
            return
        engine = self.machine.engine
        if not (self.client.restarts and num_ids and engine) or self.faults.stuck_since >= ready:
            return
        # While places or pages are short, streams wait for others to end.
        if self.crowded >= ready or engine.snapshot().preemptions:
            return
        # Every second step prefers the short ones of a priority; the other may have a chunk of a long one.
        ahead = (s for s in streams if s.length <= SHORT or s.request.priority < request.priority)
        rows = sum(stream.length for stream in ahead)
        if now - ready > RESUMED_SECONDS + 4 * ROW_SECONDS * rows:
            raise Violation(f"{request.id}, of {length} ids, was silent for {now - ready:.2f} s after a restart")


def play(story: Story, plant: Plant = ExitStack) -> str:
    """Runs the story; plant: puts a fault into the code meanwhile. Returns a digest of all that happened.
    Raises Violation, or what an engine raised."""
    logging.disable(logging.CRITICAL)
    try:
        config = config_of(story.cache_bytes, story.max_sequences)
        with virtual_time() as loop, mock.patch("engine.engine.build", parts_of), ExitStack() as planted:
            planted.enter_context(plant())
            world = World(story, config)
            planted.enter_context(mock.patch.object(client, "Spawned", world.machine.spawn))
            try:
                run(loop, world.play())
            finally:
                world.machine.forget()
            return sha256("\n".join(world.faults.trace).encode()).hexdigest()
    finally:
        logging.disable(logging.NOTSET)
