"""A fleet on the virtual clock: two ingresses, replicas with their own engines, and clients with several API keys.

All is real but Ray, which here carries calls from a forwarder to an application, and the processes of engines. After
every story: each answer has the bytes that an undisturbed engine would have given; what was refused was refused for a
limit, and never a key that has one request at a time; deadlines are kept across replicas; nothing is left behind. An
ingress that is killed takes its connections with it, and those of our own client ask the other.
"""

import asyncio
import dataclasses
import json
import logging
import pickle
import random
from base64 import b64decode
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractContextManager, ExitStack, aclosing
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any
from unittest import mock

from starlette.types import Message, Receive, Send

from clients.fastblt_client import Answer, Completion, FastBltError
from deploy.ray_answer import answer
from deploy.ray_balance import Balance
from deploy.ray_call import Call, Reply, encode_reply
from deploy.ray_forward import Forwarder
from deploy.ray_load import Meter
from deploy.ray_relay import BrokenOff, ReplicaLost
from deploy.ray_settings import RaySettings
from engine.process import client
from engine.process.client import EngineClient
from engine.process.streams import GRACE_SECONDS
from engine.types import Delta, Event, Request
from server import middleware, origin
from server.app import create_app
from server.errors import ApiError
from server.keys import KeyRing
from server.settings import ServerSettings

from .loop import run, virtual_time
from .machine import Faults, Machine, config_of, parts_of, step_clock
from .text import expected
from .world import EARLY_SECONDS, LATE_SECONDS, Plant, Violation

KEYS = (b"key-of-the-quiet-one", b"key-of-the-first-crowd", b"key-of-the-second-crowd")
QUIET = KEYS[0]
"""Has one request at a time."""
CARRY_SECONDS = 0.001
ROUTER_SECONDS = 0.01
NOTICED_SECONDS = 0.5
"""Until every ingress knows of a replica that is lost."""
WAIT = 60.0
SETTLE_SECONDS = 300.0
FIRST_BYTE_SECONDS = 4.0
"""Within which the quiet key's text begins while nothing goes wrong, however much the others have asked for."""
PATH = "/v1/completions"
LIMITS = {"queue_full", "too_many_requests", "too_many_queued_bytes"}
"""Codes of refusals that say so."""

CURRENT: ContextVar[Machine] = ContextVar("machine")
"""Of the replica whose client starts a process."""


@dataclass
class FleetStory:
    """What a seed makes of a run. All times in seconds."""

    seed: int
    num_requests: int = 60
    draw: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.draw = draw = random.Random(self.seed)
        # Small servers whose queues are full for seconds, as those that they refuse soon ask again.
        is_crowded = draw.random() < 0.2
        self.num_requests *= 3 if is_crowded else draw.choice([1, 1, 3])
        self.num_replicas = 2 if is_crowded else draw.choice([2, 2, 3])
        self.max_sequences = 2 if is_crowded else draw.choice([2, 8, 32])
        self.most_tries = 4 if is_crowded else 1
        self.span = self.num_requests * (0.005 if is_crowded else draw.choice([0.0, 0.0, 0.005, 0.05]))
        self.timeout_share = draw.choice([0.1, 0.5])
        self.settings = ServerSettings(
            max_queue=24 if is_crowded else draw.choice([24, 24, 1000]),
            max_choices=4,
            max_requests_per_key=None if is_crowded else draw.choice([None, None, None, 6]),
            max_queued_bytes_per_key=None if is_crowded else draw.choice([None, None, 3000]),
            keepalive_seconds=5.0,
        )
        kinds = ["kill", "kill", "drain", "crash", "freeze", "kill an ingress"]
        count = draw.choice([0, 0, 1, 2, 4])
        self.faults = sorted((draw.uniform(0, self.span + 2.0), draw.choice(kinds)) for _ in range(count))

    def body(self) -> dict[str, Any]:
        """Of a request."""
        draw = self.draw
        letters = "".join(draw.choice("abc \n") for _ in range(6))
        body: dict[str, Any] = {
            "prompt": (letters * 300)[: draw.choice([1, 5, 20, 60, 150, draw.choice([300, 1500])])],
            "max_tokens": draw.choice([1, 4, 12, 40, 100, 300]),
            "decoder": draw.choice(["blt", "blt-s", "blt-dv"]),
            "stop": [draw.choice("xyzXYZ") for _ in range(draw.choice([0, 0, 2]))],
            "n": draw.choice([1, 1, 1, 2]),
            "stream": draw.random() < 0.7,
            "return_bytes": True,
        }
        if draw.random() < 0.5:
            body["seed"] = draw.randrange(1 << 32)
        if draw.random() < self.timeout_share:
            # Mostly about as long as the work takes, so that one who waits is moved, and then ends at its deadline.
            body["timeout"] = draw.uniform(0.1, draw.choice([2.0, 2.0, 20.0]))
        return body


class Replica:
    """A server's process and its engine's."""

    def __init__(self, name: str, slot: int, fleet: "Fleet") -> None:
        """slot: which machine it runs on."""
        self.name = name
        self.slot = slot
        self._fleet = fleet
        self._machine = fleet.machines[slot]
        self.takes_calls = False
        self.is_gone = False
        self.num_calls = 0
        self._out: dict[asyncio.Task[None], asyncio.Queue[bytes | None]] = {}
        self._client: EngineClient | None = None
        self.app: Any = None

    async def start(self) -> None:
        context = copy_context()
        context.run(CURRENT.set, self._machine)
        self._client = EngineClient(self._fleet.configs[self.slot], step_seconds=10.0, loading_seconds=60.0)
        self._client.submit = self._noting(self._client.submit)  # type: ignore[method-assign]
        await asyncio.create_task(self._client.start(), context=context)
        if self.is_gone:
            return await self._client.stop()
        self.app = create_app(self._fleet.story.settings, self._client, KEYS)
        self._meter = Meter(self.app.state.service, self._fleet.story.max_sequences)
        self.takes_calls = True

    def _noting(self, submit: Any) -> Any:
        async def noting(request: Request, earlier: Sequence[Delta] = ()) -> AsyncGenerator[Event, None]:
            self._fleet.note_request(request)
            async with aclosing(submit(request, earlier)) as events:
                async for event in events:
                    yield event

        return noting

    async def replies(self, call: Call) -> AsyncGenerator[bytes, None]:
        """As `deploy.ray_replica` makes them, until the process is killed. Raises ReplicaLost."""
        if self.is_gone:
            raise ReplicaLost("it was gone before")
        out: asyncio.Queue[bytes | None] = asyncio.Queue()
        task = asyncio.create_task(self._answer(call, out))
        self._out[task] = out
        self.num_calls += 1
        try:
            while (reply := await out.get()) is not None:
                yield reply
            if self.is_gone:
                raise ReplicaLost("it was killed")
            await task
        finally:
            self.num_calls -= 1
            self._out.pop(task, None)
            task.cancel()

    async def _answer(self, call: Call, out: asyncio.Queue[bytes | None]) -> None:
        try:
            out.put_nowait(encode_reply(Reply(replica=self.name, load=self._meter.report())))
            async with aclosing(answer(self.app, call, self.name)) as batches:
                async for batch in batches:
                    out.put_nowait(encode_reply(Reply(messages=batch, load=self._meter.report())))
        finally:
            out.put_nowait(None)

    def kill(self, draw: random.Random) -> None:
        """The machine is gone; what was on its way is lost in part."""
        self.takes_calls, self.is_gone = False, True
        client = self._client
        if client and client._supervisor:
            client._supervisor.cancel()
        self._machine.kill()
        for task, out in self._out.items():
            left = [out.get_nowait() for _ in range(out.qsize())]
            for reply in left[: draw.randint(0, len(left))]:
                if reply is not None:
                    out.put_nowait(reply)
            out.put_nowait(None)
            task.cancel()
        if client and self.app:
            self._fleet.background(client.stop())

    async def drain(self) -> None:
        """As Ray takes a replica away: no new calls, and those under way end first."""
        self.takes_calls = False
        while self.num_calls and not self.is_gone:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        if not self.is_gone:
            self.is_gone = True
            assert self._client
            await self._client.stop()

    def forget(self) -> None:
        """Closes the files that a process would leave open until its end."""
        if self._client:
            self._client._release_spares()

    def check_empty(self) -> None:
        """Raises Violation."""
        gate = self.app.state.gate
        if gate.num_requests or gate.waiting or self.app.state.service.generations:
            raise Violation(f"{self.name} still holds {gate.num_requests} requests, {gate.waiting} of them waiting")
        if any(t.requests or t.waiting or t.queued_bytes for t in gate._tenants.values()):
            raise Violation(f"{self.name} still counts requests of a key")


class Lost(Exception):
    """The connection to an ingress."""


class Ingress:
    """One that clients reach. A request goes on with the ingress that it came to."""

    def __init__(self, fleet: "Fleet", settings: ServerSettings) -> None:
        self._fleet = fleet
        self.balance = Balance(asyncio.get_running_loop().time)
        keys = KeyRing("API keys", KEYS, None, lambda: KEYS)
        self.forwarder = Forwarder(settings, RaySettings(replica_wait=WAIT), keys, self.balance, self._carry)
        # In the order of their coming, as a set is not: a seed must play the same again.
        self._answering: dict[asyncio.Task[None], None] = {}

    async def forward(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Raises Lost if it is killed meanwhile."""
        self._answering[task := asyncio.create_task(self.forwarder.forward(scope, receive, send))] = None
        try:
            await asyncio.wait({task})
        finally:
            self._answering.pop(task, None)
            task.cancel()
        if task.cancelled():
            raise Lost
        task.result()

    def kill(self) -> None:
        for task in self._answering:
            task.cancel()

    async def _carry(self, call: Call) -> AsyncGenerator[bytes, None]:
        """As `deploy.ray_ingress` and `deploy.ray_router`."""
        await asyncio.sleep(CARRY_SECONDS)
        # Ray's router tries again by itself.
        while not (known := self._fleet.known()):  # noqa: ASYNC110
            await asyncio.sleep(ROUTER_SECONDS)
        replica = known[self.balance.choose(call.number, call.work, known, call.avoided)[0]]
        async with aclosing(replica.replies(pickle.loads(pickle.dumps(call)))) as replies:
            async for reply in replies:
                yield reply

    def check_empty(self) -> None:
        """Raises Violation."""
        if self.forwarder.gate.num_requests:
            raise Violation("an ingress still holds requests")
        if any(known.sent for known in self.balance._replicas.values()):
            raise Violation("an ingress still counts calls")


class Client:
    """One request, and what came of it."""

    def __init__(self, fleet: "Fleet", number: int, key: bytes, body: dict[str, Any]) -> None:
        self._fleet = fleet
        self.number, self.key, self.body = number, key, body
        self.start: Message | None = None
        self.data = b""
        self.is_whole = False
        self.first_byte: float | None = None
        draw = fleet.story.draw
        self._is_slow = key != QUIET and draw.random() < 0.1
        self.leaves_after = draw.uniform(0, 3.0) if key != QUIET and draw.random() < 0.1 else None
        self._asks_again = draw.random() < 0.5
        self._connections = 0
        self._answer: Answer | None = None
        self._events: list[Completion] = []
        if self._asks_again and body["stream"]:
            self._answer = Answer({"seed": draw.getrandbits(31)} | body)

    @property
    def was_refused(self) -> bool:
        """Whether its answer is a refusal, which only says that it may come again."""
        return bool(self.is_whole and self.start and self.start["status"] != 200)

    async def ask(self, slot: int) -> None:
        """slot: of the ingress."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(self.leaves_after):
                while True:
                    try:
                        await self._ask_once(self._fleet.ingresses[slot])
                        break
                    except Lost:
                        if not self._asks_again:
                            return
                        self._fleet.note(f"{self.number} asks again")
                    slot = 1 - slot
                    began = began if self._answer else loop.time()
        except TimeoutError:
            if self.leaves_after is None:
                raise
            return
        except BrokenOff:
            if self.body["stream"] or not self._fleet.num_killed:
                raise Violation(f"{self.number} broke off") from None
            return
        except ApiError as error:
            headers = [(name.encode(), value.encode()) for name, value in error.headers.items()]
            self.start = {"status": error.status, "headers": headers}
            self.data, self.is_whole = json.dumps(error.body).encode(), True
        except (Violation, FastBltError) as error:
            raise Violation(f"{self.number}: {error}") from error
        except Exception as error:
            raise Violation(f"{self.number}: the ingress failed: {error!r}") from error
        try:
            self.check(loop.time() - began)
        except ValueError as error:
            raise Violation(f"{self.number}: its answer cannot be read: {error}") from error

    async def _ask_once(self, ingress: Ingress) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        self._connections += 1
        body = self._answer.request() if self._answer else self.body
        bodies = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        never = asyncio.Event()
        self.start, self.data, self.is_whole = None, b"", False

        async def receive() -> Message:
            if not bodies:
                await never.wait()
            return bodies.pop()

        async def send(message: Message) -> None:
            self._fleet.note(f"{self.number} {message['type']} {len(message.get('body', b''))}")
            if message["type"] == "http.response.start":
                self.start = message
                return
            self.data += message["body"]
            if self._answer and self.start and self.start["status"] == 200:
                self._events += self._answer.feed(message["body"])
            self.is_whole |= not message["more_body"]
            if message["body"].strip() and self.first_byte is None:
                self.first_byte = loop.time() - began
            if self._is_slow:
                await asyncio.sleep(self._fleet.story.draw.uniform(0, 0.3))

        await ingress.forward(self._scope(), receive, send)

    def _scope(self) -> dict[str, Any]:
        headers = [(b"content-type", b"application/json"), (b"authorization", b"Bearer " + self.key)]
        headers.append((b"x-request-id", f"r{self.number}".encode()))
        scope: dict[str, Any] = {"type": "http", "http_version": "1.1", "method": "POST", "scheme": "http"}
        scope |= {"path": PATH, "raw_path": PATH.encode(), "query_string": b"", "headers": headers}
        return scope | {"client": ("127.0.0.1", 1), "server": ("127.0.0.1", 1)}

    def check(self, seconds: float) -> None:
        """Holds the answer against what it should be. Raises Violation."""
        if not (self.start and self.is_whole):
            raise Violation(f"{self.number}: its answer has no end")
        if self.start["status"] != 200:
            return self._check_refusal(self.start["status"], json.loads(self.data)["error"])
        choices: dict[int, dict[str, Any]] = {}
        if self.body["stream"]:
            lines = [line for line in self.data.decode().split("\n") if line]
            if lines.pop() != "data: [DONE]":
                raise Violation(f"{self.number}: its stream has no end")
            chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
            if self._answer:
                # Also of connections before the last.
                self._answer.check_done()
                chunks = [dataclasses.asdict(event) for event in self._events]
        else:
            chunks = [json.loads(self.data)]
        for chunk in chunks:
            if "error" in chunk:
                raise Violation(f"{self.number} failed: {chunk['error']['message']}")
            for choice in chunk["choices"]:
                whole = choices.setdefault(choice["index"], {"data": b"", "reason": None})
                part = choice.get("bytes") or choice.get("encoded") or ""
                whole["data"] += b64decode(part)
                whole["reason"] = choice["finish_reason"] or whole["reason"]
        ids = {chunk["id"] for chunk in chunks}
        if len(ids) != 1 or len(choices) != self.body["n"]:
            raise Violation(f"{self.number}: {len(ids)} ids and {len(choices)} choices")
        for index, choice in choices.items():
            request = self._fleet.requests.get(f"{ids.copy().pop()}-{index}")
            if request:
                self._check_text(request, choice["data"], choice["reason"])
            elif choice["reason"] != "timeout":
                raise Violation(f"{self.number}: no engine has seen choice {index}, which ended by {choice['reason']}")
        limit = self.body.get("timeout")
        if seconds < (limit or 0.0) - EARLY_SECONDS and "timeout" in [choice["reason"] for choice in choices.values()]:
            raise Violation(f"{self.number} ended before its deadline")
        # A connection after the deadline, too, has a moment, and its ingress does not know of those before.
        late = 0.0 if limit is None else seconds - limit - GRACE_SECONDS * (self._connections if self._answer else 1)
        if late > LATE_SECONDS + CARRY_SECONDS and not self._is_slow:
            raise Violation(f"{self.number} ended {late:.2f} s after its deadline")
        quiet = self.key == QUIET and not self._fleet.story.faults
        if quiet and (self.first_byte is None or self.first_byte > FIRST_BYTE_SECONDS):
            raise Violation(f"the quiet key waited {self.first_byte} s behind the others")

    def _check_text(self, request: Request, data: bytes, reason: str) -> None:
        want = expected(request)
        if reason == "timeout" and request.timeout is not None:
            if not want.text.startswith(data):
                raise Violation(f"{self.number} got {data!r} instead of a beginning of {want.text!r}")
        elif (data, reason) != (want.text, want.reason):
            raise Violation(f"{self.number} ended by {reason} with {data!r}, not {want}")

    def _check_refusal(self, status: int, error: dict[str, Any]) -> None:
        assert self.start
        if status != 429 or error["code"] not in LIMITS:
            raise Violation(f"{self.number} was refused: {status} {error['code']}: {error['message']}")
        if b"retry-after" not in dict(map(tuple, self.start["headers"])):
            raise Violation(f"{self.number} was refused without a time to come again")
        if self.key == QUIET:
            raise Violation(f"the quiet key was refused: {error['message']}")


class Fleet:
    """All that a story happens to."""

    def __init__(self, story: FleetStory) -> None:
        self.story, self.draw = story, story.draw
        count = story.num_replicas
        # A page apart, so that each has its own parts.
        self.configs = [config_of((16 << 20) + (n << 16), story.max_sequences) for n in range(count)]
        self.machines = [Machine(Faults(story.draw)) for _ in range(count)]
        self.replicas: list[Replica] = []
        self.started: list[Replica] = []
        """Those that are gone, too."""
        self.requests: dict[str, Request] = {}
        self.num_killed = 0
        self.trace: list[str] = []
        self._lost: dict[str, tuple[Replica, float]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._numbers = iter(range(1 << 30))

    def note(self, what: str) -> None:
        self.trace.append(f"{asyncio.get_running_loop().time():.6f} {what}")

    def note_request(self, request: Request) -> None:
        """Every attempt must ask for the same. Raises Violation."""
        base, _, index = request.id.rpartition("-")
        first = self.requests.setdefault(f"{base.partition('.')[0]}-{index}", request)
        if (first.prompt_ids, first.sampling, first.sample_index) != (
            request.prompt_ids,
            request.sampling,
            request.sample_index,
        ):
            raise Violation(f"{request.id} asks for something else than {first.id}")

    def background(self, work: Any) -> None:
        self._tasks.add(task := asyncio.create_task(work))
        task.add_done_callback(self._tasks.discard)

    def known(self) -> dict[str, Replica]:
        """What ingresses take for replicas, some of which may have just been lost."""
        now = asyncio.get_running_loop().time()
        found = {r.name: r for r in self.replicas if r.takes_calls}
        return found | {name: r for name, (r, when) in self._lost.items() if now < when + NOTICED_SECONDS}

    async def play(self) -> None:
        loop, story = asyncio.get_running_loop(), self.story
        await asyncio.gather(*(self._add(slot) for slot in range(story.num_replicas)))
        self.ingresses = [Ingress(self, story.settings) for _ in range(2)]
        start = loop.time()
        crowd = [
            self._one(start + self.draw.uniform(0, story.span), KEYS[1 + n % 2]) for n in range(story.num_requests)
        ]
        tasks = [asyncio.create_task(one) for one in crowd]
        tasks += [asyncio.create_task(self._quiet(start)), asyncio.create_task(self._harm(start))]
        done, left = await asyncio.wait(tasks, timeout=SETTLE_SECONDS, return_when="FIRST_EXCEPTION")
        for machine in self.machines:
            if machine.faults.errors:
                raise machine.faults.errors[0]
        for task in done:
            task.result()
        if left:
            raise Violation(f"{len(left)} requests never ended")
        await asyncio.sleep(1.0)
        for ingress in self.ingresses:
            ingress.check_empty()
        for replica in self.replicas:
            if replica.takes_calls:
                replica.check_empty()

    async def _one(self, at: float, key: bytes) -> None:
        body, slot = self.story.body(), self.draw.randrange(2)
        await asyncio.sleep(max(at - asyncio.get_running_loop().time(), 0))
        for _ in range(self.story.most_tries):
            one = Client(self, next(self._numbers), key, body)
            await one.ask(slot)
            if not one.was_refused:
                return
            await asyncio.sleep(self.draw.uniform(0, 0.4))

    async def _quiet(self, start: float) -> None:
        for _ in range(8):
            await asyncio.sleep(self.draw.uniform(0, 0.5))
            await self._one(start, QUIET)

    async def _add(self, slot: int) -> None:
        """A new replica, as Ray starts one in the place of another."""
        self.machines[slot].faults.frozen = False
        replica = Replica(f"replica-{next(self._numbers)}", slot, self)
        self.replicas.append(replica)
        self.started.append(replica)
        await replica.start()

    async def _harm(self, start: float) -> None:
        loop, draw = asyncio.get_running_loop(), self.draw
        for at, kind in self.story.faults:
            await asyncio.sleep(max(start + at - loop.time(), 0))
            if kind == "kill an ingress":
                slot = draw.randrange(2)
                self.note(f"{kind} {slot}")
                self.ingresses[slot].kill()
                self.ingresses[slot] = Ingress(self, self.story.settings)
                continue
            ready = [replica for replica in self.replicas if replica.takes_calls]
            if not ready:
                continue
            victim = draw.choice(ready)
            self.note(f"{kind} {victim.name}")
            if kind in ("kill", "drain"):
                if kind == "kill":
                    self.num_killed += 1
                    self._lost[victim.name] = victim, loop.time()
                    victim.kill(draw)
                else:
                    await victim.drain()
                await asyncio.sleep(draw.uniform(0, 3.0))
                self.replicas.remove(victim)
                await self._add(victim.slot)
            elif kind == "crash":
                self.machines[victim.slot].kill()
            else:
                self.machines[victim.slot].faults.frozen = True


class _Drawn:
    """In place of `secrets`."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)

    def randbits(self, count: int) -> int:
        return self._draw.getrandbits(count)

    def token_hex(self, count: int) -> str:
        return self._draw.randbytes(count).hex()


def play(story: FleetStory, plant: Plant = ExitStack) -> str:
    """Runs the story; plant: puts a fault into the code meanwhile. Returns a digest of all that happened. Raises
    Violation, or what an engine raised."""
    logging.disable(logging.CRITICAL)
    try:
        with virtual_time() as loop, ExitStack() as planted:
            drawn = _Drawn(story.seed)
            patches: list[AbstractContextManager[object]] = [
                plant(),
                mock.patch("engine.engine.build", parts_of),
                mock.patch("time.perf_counter", lambda: loop.time() + step_clock.seconds),
                mock.patch.object(client, "Spawned", lambda: CURRENT.get().spawn()),
                mock.patch.object(origin, "secrets", drawn),
                mock.patch.object(middleware, "secrets", drawn),
            ]
            for patch in patches:
                planted.enter_context(patch)
            fleet = Fleet(story)
            try:
                run(loop, fleet.play())
            finally:
                for part in (*fleet.machines, *fleet.started):
                    part.forget()
            return sha256("\n".join(fleet.trace).encode()).hexdigest()
    finally:
        logging.disable(logging.NOTSET)
