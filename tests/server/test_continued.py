"""A completion whose replica is lost, continued by another: the client gets what one undisturbed replica says.

Two applications over a real engine; only Ray is left out. The same with it, and an engine for each, is in tests/ops.
"""

import asyncio
import json
import pickle
import random
from base64 import b64decode
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from copy import copy
from dataclasses import replace
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.types import Message

from deploy import ray_answer, ray_relay
from deploy.ray_answer import answer
from deploy.ray_call import MOST_ASKED, Call
from deploy.ray_load import Load, Meter
from deploy.ray_relay import BrokenOff, NoRoom, Relay, ReplicaLost
from engine.config import EngineConfig
from engine.process.client import EngineClient
from engine.types import Delta, Event, Finished, Request, Usage
from server.admission import Gate
from server.app import create_app
from server.errors import ApiError
from server.origin import Origin
from server.settings import ServerSettings
from tests.scripted_server import ScriptedClient

SETTINGS = ServerSettings(max_choices=8)
OUTPUT = 40
ASKED: dict[str, dict[str, Any]] = {
    "greedy": {"prompt": "def add(a, b):", "temperature": 0, "ignore_eos": True},
    "without a seed": {"prompt": ["a", "a"], "temperature": 1.0, "ignore_eos": True},
    "scores": {"prompt": "import", "seed": 5, "n": 2, "logprobs": 3, "echo": True, "prompt_logprobs": 1},
    "penalties and a stop": {
        "prompt": "x" * 300,
        "seed": 6,
        "frequency_penalty": 0.4,
        "stop": ["\n\n", "aa"],
        "min_tokens": 20,
        "return_bytes": True,
    },
    "trace and patches": {"prompt": "class A", "seed": 7, "trace": True, "patches": True, "return_token_ids": True},
    "grammar": {"prompt": "say", "seed": 8, "structured_outputs": {"regex": "[a-f]{30,34}[0-9]"}},
    **{name: {"prompt": "for i in", "seed": 9, "n": 2, "decoder": name} for name in ("blt-s", "blt-d", "blt-dv")},
}


LAST = -1
"""Instead of a number of messages: all but the last, which only says that there are no more."""


class Replica:
    """An application, which loses a call after so many messages."""

    def __init__(self, name: str, app: FastAPI) -> None:
        self.name = name
        self.app = app
        self.num_calls = 0

    async def serve(self, call: Call, most: int) -> AsyncGenerator[str | list[Message], None]:
        self.num_calls += 1
        yield self.name
        async with aclosing(answer(self.app, call, self.name)) as batches:
            async for batch in batches:
                if most == LAST and batch[-1].get("more_body") is False:
                    most = len(batch) - 1
                elif most == LAST:
                    yield batch
                    continue
                if len(batch) > most:
                    yield batch[:most]
                    raise ReplicaLost("of the test")
                most -= len(batch)
                yield batch


class Fleet:
    def __init__(self, *replicas: Replica) -> None:
        self.replicas = replicas
        self.losses: list[int] = []
        """After how many messages the calls are lost, in turn; the rest are not."""
        self.calls: list[Call] = []

    async def ask(self, call: Call) -> AsyncGenerator[str | list[Message], None]:
        self.calls.append(call)
        replica = self.replicas[(len(self.calls) - 1) % len(self.replicas)]
        async with aclosing(replica.serve(call, self.losses.pop(0) if self.losses else 1 << 30)) as items:
            async for item in items:
                yield item


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    from engine.checkpoint import PRESETS, calibrated, random_tensors, save

    path = tmp_path_factory.mktemp("continued") / "tiny"
    tensors = random_tensors(PRESETS["tiny"], seed=1)
    save(path, calibrated(PRESETS["tiny"], tensors), tensors)
    return EngineConfig(model=str(path), cache_bytes=32 << 20, num_threads=1)


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    """Of all that these tests do: the engines are started once."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def client(config: EngineConfig, loop: asyncio.Runner) -> Iterator[EngineClient]:
    client = EngineClient(config)
    loop.run(client.start())
    yield client
    loop.run(client.stop())


@pytest.fixture(scope="module")
def pair(client: EngineClient, loop: asyncio.Runner) -> Iterator[tuple[Replica, Replica]]:
    async def start() -> tuple[Replica, Replica]:
        return Replica("one", create_app(SETTINGS, client)), Replica("two", create_app(SETTINGS, client))

    pair = loop.run(start())
    yield pair
    for replica in pair:
        replica.app.state.grammars.close()


@pytest.fixture(autouse=True)
def no_gathering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers come in as many batches as they can."""
    monkeypatch.setattr(ray_answer, "GATHER_SECONDS", 0.0)
    monkeypatch.setattr(ray_answer, "TELL_SECONDS", 0.01)
    monkeypatch.setattr(ray_relay, "RETRY_SECONDS", 0.01)


async def relayed(fleet: Fleet, wait: float = 20.0, origin: Origin | None = None, **fields: Any) -> list[Message]:
    """What the client gets."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    relay = Relay(fleet.ask, send, wait=wait, keepalive=0.05, unavailable=Gate(SETTINGS).unavailable)
    await relay.run(call_of(origin or Origin(), **fields))
    return sent


def call_of(origin: Origin | None, **fields: Any) -> Call:
    path = "/v1/completions"
    scope = {"type": "http", "http_version": "1.1", "method": "POST", "scheme": "http", "path": path}
    scope |= {"raw_path": path.encode(), "query_string": b"", "root_path": "", "client": ("127.0.0.1", 1)}
    scope |= {"server": ("127.0.0.1", 1), "asgi": {"version": "3.0", "spec_version": "2.3"}}
    scope["headers"] = [(b"content-type", b"application/json"), (b"x-request-id", b"one")]
    return Call(scope, json.dumps({"model": "tiny", "max_tokens": OUTPUT, **fields}).encode(), origin=origin)


def said(messages: list[Message]) -> dict[str, Any]:
    """A response as the sum of its chunks, without what shows the engine's work."""
    start, *bodies = messages
    assert start["type"] == "http.response.start" and start["status"] == 200
    assert [message.get("more_body", False) for message in bodies][-1:] == [False]
    body = b"".join(message["body"] for message in bodies)
    if b"text/event-stream; charset=utf-8" not in dict(start["headers"]).values():
        return _bare(json.loads(body))
    lines = [line for line in body.decode().splitlines() if line]
    assert lines.pop() == "data: [DONE]" and "data: [DONE]" not in lines
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    whole: dict[str, Any] = {"choices": {}}
    for chunk in chunks:
        assert "error" not in chunk, chunk
        assert whole.setdefault("id", chunk["id"]) == chunk["id"], chunk
        assert whole.setdefault("created", chunk["created"]) == chunk["created"]
        assert "usage" not in whole
        if chunk.get("usage"):
            whole["usage"] = chunk["usage"]
        for choice in chunk["choices"]:
            _add(whole["choices"].setdefault(choice.pop("index"), {}), choice)
    return _bare(whole)


def _add(whole: dict[str, Any], part: dict[str, Any]) -> None:
    for name, value in part.items():
        if name == "bytes" and isinstance(value, str):
            value = list(b64decode(value))
        if value is None or name in ("output_start", "threshold", "rise", "max_patch_length", "finish_reason"):
            whole[name] = value
        elif isinstance(value, dict):
            _add(whole.setdefault(name, {}), value)
        else:
            whole[name] = value if whole.get(name) is None else whole[name] + value


def _bare(body: dict[str, Any]) -> dict[str, Any]:
    if usage := body.pop("usage", None):
        body["counts"] = {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    choices = body["choices"]
    for choice in choices.values() if isinstance(choices, dict) else choices:
        if trace := choice.pop("trace", None):
            # Rounds depend on where an engine began; what they made does not.
            choice["trace"] = [i for round in trace["rounds"] for i in round["ids"]], trace["patch_starts"]
    return body


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("name", ASKED)
def test_the_client_gets_what_one_replica_says(
    name: str, stream: bool, pair: tuple[Replica, Replica], loop: asyncio.Runner
) -> None:
    fields = {**ASKED[name], "stream": stream}
    if stream:
        fields["stream_options"] = {"include_usage": True}
    origin = Origin()
    whole = Fleet(pair[0])
    expected = loop.run(relayed(whole, origin=origin, **fields))
    draw = random.Random(name)
    num_messages = len(expected)
    for _ in range(4):
        fleet = Fleet(*pair)
        fleet.losses = [draw.randrange(num_messages + 1) for _ in range(draw.choice((1, 1, 2, 3)))]
        losses = list(fleet.losses)
        got = loop.run(relayed(fleet, origin=origin, **fields))
        assert said(got) == said(list(expected)), losses


STREAM = {"prompt": "def f(", "seed": 4, "max_tokens": 200, "ignore_eos": True, "stream": True}
EARLY = 3
"""Messages: the start of the response and two chunks."""


def events_of(messages: list[Message]) -> list[Any]:
    """The events of a stream, but for the last."""
    lines = [line for message in messages[1:] for line in message["body"].decode().splitlines() if line]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_a_stream_that_is_lost_after_its_last_event_is_not_repeated(
    pair: tuple[Replica, Replica], loop: asyncio.Runner
) -> None:
    whole = loop.run(relayed(Fleet(pair[0]), **STREAM))
    fleet = Fleet(*pair)
    fleet.losses = [LAST]
    got = loop.run(relayed(fleet, **STREAM))
    assert len(fleet.calls) == 1 and said(got)["choices"] == said(whole)["choices"]


def test_the_server_that_continues_a_request_counts_it(pair: tuple[Replica, Replica], loop: asyncio.Runner) -> None:
    def counts() -> list[float]:
        registries = (replica.app.state.service.metrics for replica in pair)
        return [
            family.samples[0].value
            for metrics in registries
            for family in metrics.collect()
            if family.name == "fastblt_requests_continued"
        ]

    before = counts()
    fleet = Fleet(*pair)
    fleet.losses = [EARLY, EARLY]
    loop.run(relayed(fleet, **STREAM))
    # Two continues, then one, unless two had told all of it before it was lost.
    assert len(fleet.calls) in (2, 3)
    assert [after - was for after, was in zip(counts(), before, strict=True)] == [len(fleet.calls) - 2, 1]


def test_a_request_that_loses_one_replica_after_the_other_is_given_up(
    pair: tuple[Replica, Replica], loop: asyncio.Runner
) -> None:
    fleet = Fleet(*pair)
    fleet.losses = [0] * 9
    with pytest.raises(ApiError, match="4 replicas in a row were lost") as refused:
        loop.run(relayed(fleet, **STREAM))
    assert (refused.value.status, refused.value.body["error"]["code"]) == (503, "replica_lost")
    assert len(fleet.calls) == 4

    fleet = Fleet(*pair)
    fleet.losses = [EARLY, *[0] * 9]
    error = events_of(loop.run(relayed(fleet, **STREAM)))[-1]["error"]
    assert error["code"] == "replica_lost" and "4 replicas in a row" in error["message"]
    # Progress between two losses begins the count anew.
    fleet = Fleet(*pair)
    fleet.losses = [EARLY, 0, 0, EARLY, 0, 0, EARLY]
    assert events_of(loop.run(relayed(fleet, **STREAM)))[-1]["choices"][0]["finish_reason"] == "length"


class Gone(Fleet):
    """Its first calls reach no replica any more."""

    num_gone = 0

    async def ask(self, call: Call) -> AsyncGenerator[str | list[Message], None]:
        if len(self.calls) < self.num_gone:
            self.calls.append(call)
            raise ReplicaLost("it was gone before")
        async with aclosing(super().ask(call)) as items:
            async for item in items:
                yield item


def test_a_replica_that_was_gone_before_says_nothing_of_the_request(
    pair: tuple[Replica, Replica], loop: asyncio.Runner
) -> None:
    fleet = Gone(*pair)
    fleet.num_gone = 3 * ray_relay.MOST_LOSSES
    assert events_of(loop.run(relayed(fleet, **STREAM)))[-1]["choices"][0]["finish_reason"] == "length"
    assert len(fleet.calls) == fleet.num_gone + 1
    fleet = Gone(*pair)
    fleet.num_gone = 1 << 30
    with pytest.raises(ApiError, match="no replica has room") as refused:
        loop.run(relayed(fleet, wait=0.1, **STREAM))
    assert (refused.value.status, refused.value.body["error"]["code"]) == (503, "no_replica")


def test_what_only_one_replica_can_answer_is_not_asked_of_another(
    pair: tuple[Replica, Replica], loop: asyncio.Runner
) -> None:
    async def ask() -> None:
        fleet = Gone(*pair)
        fleet.num_gone = 1 << 30

        async def send(message: Message) -> None: ...

        relay = Relay(fleet.ask, send, wait=5.0, keepalive=1.0, unavailable=Gate(SETTINGS).unavailable)
        await relay.run(Call(call_of(None).scope, b"", replica="one"))

    with pytest.raises(ApiError, match="^the replica is gone; send it again"):
        loop.run(ask())


def test_an_answer_that_is_whole_is_not_asked_for_again(pair: tuple[Replica, Replica], loop: asyncio.Runner) -> None:
    fields = {**STREAM, "stream": False, "max_tokens": 20}
    whole = loop.run(relayed(Fleet(pair[0]), **fields))

    class AfterItsLastWord(Fleet):
        async def ask(self, call: Call) -> AsyncGenerator[str | list[Message], None]:
            async with aclosing(super().ask(call)) as items:
                async for item in items:
                    yield item
            raise ReplicaLost("after its last word")

    fleet = AfterItsLastWord(*pair)
    got = loop.run(relayed(fleet, **fields))
    assert len(fleet.calls) == 1 and said(got)["choices"] == said(whole)["choices"]


def test_a_stream_waits_for_another_replica_and_says_so_in_vain(
    pair: tuple[Replica, Replica], loop: asyncio.Runner
) -> None:
    class Last(Fleet):
        patience = 0.0

        async def ask(self, call: Call) -> AsyncGenerator[str | list[Message], None]:
            if self.calls:
                await asyncio.sleep(self.patience)
                if self.patience > 1:
                    raise NoRoom
            async with aclosing(super().ask(call)) as items:
                async for item in items:
                    yield item

    fleet = Last(*pair)
    fleet.losses, fleet.patience = [EARLY], 2.0
    messages = loop.run(relayed(fleet, wait=0.3, **STREAM))
    error = events_of(messages)[-1]["error"]
    assert "no other took it within 0.3 s" in error["message"] and error["code"] == "replica_lost"
    assert sum(message.get("body") == b"\n\n" for message in messages) >= 3

    fleet = Last(*pair)
    fleet.losses, fleet.patience = [EARLY], 0.2
    assert events_of(loop.run(relayed(fleet, wait=5.0, **STREAM)))[-1]["choices"][0]["finish_reason"] == "length"


async def test_a_stream_of_a_replica_that_hangs_gets_empty_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """But none inside an event, and a whole answer gets none."""
    monkeypatch.setattr(ray_relay, "LATER_SECONDS", 0.0)

    async def sent(content_type: bytes, *bodies: bytes) -> list[bytes]:
        async def hangs(call: Call) -> AsyncGenerator[str | list[Message], None]:
            yield "one"
            yield [{"type": "http.response.start", "status": 200, "headers": [(b"content-type", content_type)]}]
            for body in bodies:
                yield [{"type": "http.response.body", "body": body, "more_body": True}]
                await asyncio.sleep(0.3)
            yield [{"type": "http.response.body", "body": b"", "more_body": False}]

        got: list[bytes] = []

        async def send(message: Message) -> None:
            got.append(message.get("body", b""))

        relay = Relay(hangs, send, wait=5.0, keepalive=0.05, unavailable=Gate(SETTINGS).unavailable)
        await relay.run(Call({}, b"", origin=Origin()))
        return got[1:-1]

    stream = b"text/event-stream; charset=utf-8"
    first, *lines = await sent(stream, b"data: 1\n\n")
    assert first == b"data: 1\n\n" and set(lines) == {b"\n\n"} and len(lines) >= 2
    assert (await sent(stream, b"data: ", b"1\n\n"))[:2] == [b"data: ", b"1\n\n"]
    assert await sent(b"application/json", b"{", b"}") == [b"{", b"}"]


def test_a_replica_that_refuses_for_now_is_passed_over(pair: tuple[Replica, Replica], loop: asyncio.Runner) -> None:
    one, two = pair
    one.app.state.gate.drain()
    try:
        fleet = Fleet(one, two)
        assert events_of(loop.run(relayed(fleet, **STREAM)))[-1]["choices"][0]["finish_reason"] == "length"
        assert [call.avoided for call in fleet.calls] == [frozenset(), {"one"}]
        (refused, _) = loop.run(relayed(Fleet(one), **STREAM))
        assert refused["status"] == 503
    finally:
        one.app.state.gate.resume()


def test_if_all_queues_are_full_the_shortest_wait_is_told(
    pair: tuple[Replica, Replica], loop: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    for replica, seconds in zip(pair, (9, 4), strict=True):
        monkeypatch.setattr(replica.app.state.gate, "capacity", 0)
        monkeypatch.setattr(replica.app.state.gate, "retry_seconds", lambda _, seconds=seconds: seconds)
    fleet = Fleet(*pair)
    (refused, body) = loop.run(relayed(fleet, **STREAM))
    assert refused["status"] == 429 and dict(refused["headers"])[b"retry-after"] == b"4"
    assert json.loads(body["body"])["error"]["code"] == "queue_full" and not body["more_body"]
    # Each was asked, and one of them again before it was clear that there is no other.
    assert len(fleet.calls) == 3
    fleet = Fleet(*(Replica(str(number), pair[number % 2].app) for number in range(50)))
    (refused, _) = loop.run(relayed(fleet, **STREAM))
    assert refused["status"] == 429 and len(fleet.calls) == MOST_ASKED


def test_only_the_refusal_that_the_client_sees_counts_as_a_rejection(
    pair: tuple[Replica, Replica], loop: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = pair

    def counts() -> Counter[str]:
        found = Counter[str]()
        for replica in pair:
            for family in replica.app.state.service.metrics.collect():
                for sample in family.samples:
                    if sample.name in ("fastblt_requests_total", "fastblt_rejections_total"):
                        found[sample.labels.get("outcome") or sample.labels["reason"]] += int(sample.value)
        return found

    before = counts()
    monkeypatch.setattr(one.app.state.gate, "capacity", 0)
    loop.run(relayed(Fleet(one, two), **STREAM))
    assert counts() - before == {"passed_on": 1, "ok": 1}
    before = counts()
    monkeypatch.setattr(two.app.state.gate, "capacity", 0)
    loop.run(relayed(Fleet(one, two), **STREAM))
    assert counts() - before == {"passed_on": 2, "rejected": 1, "queue_full": 1}


def test_what_another_replica_admitted_is_not_refused(pair: tuple[Replica, Replica], loop: asyncio.Runner) -> None:
    one, two = pair

    class Full(Fleet):
        async def ask(self, call: Call) -> AsyncGenerator[str | list[Message], None]:
            two.app.state.gate.capacity = 0
            async with aclosing(super().ask(call)) as items:
                async for item in items:
                    yield item

    fleet = Full(one, two)
    fleet.losses = [EARLY]
    try:
        assert events_of(loop.run(relayed(fleet, **STREAM)))[-1]["choices"][0]["finish_reason"] == "length"
        (refused, _) = loop.run(relayed(Fleet(two), **STREAM))
        assert refused["status"] == 429
    finally:
        two.app.state.gate.capacity = SETTINGS.max_queue
    assert two.app.state.gate.num_requests == two.app.state.gate.waiting == 0


def test_a_grammar_that_an_engine_has_begun_is_not_refused_by_a_busy_replica(
    pair: tuple[Replica, Replica], loop: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = pair

    async def slow(grammar: str, api_key: bytes) -> str:
        return "its compilation takes more than 0.5 s of processor time"

    monkeypatch.setattr(two.app.state.grammars, "fault", slow)
    fields = {**ASKED["grammar"], "stream": True}
    whole = loop.run(relayed(Fleet(one), **fields))
    fleet = Fleet(*pair)
    fleet.losses = [EARLY]
    assert said(loop.run(relayed(fleet, **fields)))["choices"] == said(whole)["choices"]
    assert len(fleet.calls) == 2
    (refused, _) = loop.run(relayed(Fleet(two), **fields))
    assert refused["status"] == 400


def in_parts(messages: list[Message]) -> Iterator[Message]:
    """The messages, but a body in two."""
    for message in messages:
        if body := message.get("body"):
            yield message | {"body": body[:1000], "more_body": True}
            message = {"type": message["type"], "body": body[1000:], "more_body": message.get("more_body", False)}
        yield message


class LostInTheBody(Fleet):
    """Its first call is lost after so many messages of the answer itself."""

    num_messages = 0

    async def ask(self, call: Call) -> AsyncGenerator[str | list[Message], None]:
        left = self.num_messages if not self.calls else 1 << 30
        async with aclosing(super().ask(call)) as items:
            async for item in items:
                for message in in_parts(item) if isinstance(item, list) else ():
                    yield [message]
                    left -= message["type"].startswith("http.")
                    if not left:
                        raise ReplicaLost("of the test")
                if isinstance(item, str):
                    yield item


@pytest.mark.parametrize("num_messages", [1, 2])
def test_a_large_answer_of_which_a_part_was_sent_breaks_off(
    num_messages: int, pair: tuple[Replica, Replica], loop: asyncio.Runner
) -> None:
    """What another replica would say does not fit to them: it counts its own work."""
    fields = {**STREAM, "stream": False, "n": 3}
    expected = loop.run(relayed(Fleet(pair[0]), **fields))
    fleet = LostInTheBody(*pair)
    fleet.num_messages = num_messages
    if num_messages == 1:
        # Only the status was sent.
        assert said(loop.run(relayed(fleet, **fields)))["choices"] == said(expected)["choices"]
        return
    with pytest.raises(BrokenOff, match="the replica that ran this request is gone"):
        loop.run(relayed(fleet, **fields))
    assert len(fleet.calls) == 1


def test_what_another_replica_refuses_for_good_is_an_error_that_says_why(
    pair: tuple[Replica, Replica], client: EngineClient, loop: asyncio.Runner
) -> None:
    locked = Replica("locked", create_app(SETTINGS, client, (b"k" * 20,)))
    fleet = Fleet(pair[0], locked)
    fleet.losses = [EARLY]
    error = events_of(loop.run(relayed(fleet, **STREAM)))[-1]["error"]
    locked.app.state.grammars.close()
    assert error["code"] == "invalid_api_key"


@pytest.mark.parametrize("stream", [True, False])
def test_only_a_replica_of_the_same_model_continues_a_request(
    stream: bool, pair: tuple[Replica, Replica], client: EngineClient, loop: asyncio.Runner
) -> None:
    one, two = pair
    replaced = copy(client)
    replaced.limits = replace(client.limits, fingerprint="of other weights")
    other = Replica("other", create_app(SETTINGS, replaced))
    # Long enough that an answer that is sent whole comes after a message that only tells.
    fields = STREAM | {"stream": stream, "max_tokens": 200 if stream else 2000}
    # Of the other one nothing but that it has some of the output.
    losses = EARLY if stream else 1
    try:
        fleet = Fleet(one, other, two)
        fleet.losses = [losses]
        assert said(loop.run(relayed(fleet, **fields)))["choices"]
        assert [call.avoided for call in fleet.calls[1:]] == [{"one"}, {"one", "other"}]
        fleet = Fleet(one, other, other)
        fleet.losses = [losses]
        messages = loop.run(relayed(fleet, **fields))
        error = events_of(messages)[-1]["error"] if stream else json.loads(messages[1]["body"])["error"]
        assert error["code"] == "replica_lost" and "run another model" in error["message"]
        assert len(fleet.calls) == 3
        # All are asked, however many.
        others = (Replica(str(number), other.app) for number in range(2 * MOST_ASKED))
        fleet = Fleet(one, *others, two)
        fleet.losses = [losses]
        assert said(loop.run(relayed(fleet, **fields)))["choices"]
        assert len(fleet.calls) == 2 * MOST_ASKED + 2
        # What has told nothing begins anew.
        fleet = Fleet(one, other)
        fleet.losses = [0]
        assert said(loop.run(relayed(fleet, **fields)))["choices"]
    finally:
        other.app.state.grammars.close()


def test_the_deadline_is_that_of_the_first_replica(pair: tuple[Replica, Replica], loop: asyncio.Runner) -> None:
    fleet = Fleet(pair[0])
    origin = Origin(is_continued=True, attempt=1, age=3.0)
    whole = said(loop.run(relayed(fleet, origin=origin, **STREAM | {"timeout": 2.0})))
    assert whole["choices"][0]["finish_reason"] == "timeout" and not whole["choices"][0].get("text")


class Waits(Fleet):
    """Sends a call as Ray does: pickled, once there is a replica for it."""

    async def ask(self, call: Call) -> AsyncGenerator[str | list[Message], None]:
        await asyncio.sleep(0.5 if len(self.calls) == len(self.replicas) - 1 else 0.0)
        async with aclosing(super().ask(pickle.loads(pickle.dumps(call)))) as items:
            async for item in items:
                yield item


@pytest.mark.parametrize("num_losses", [0, 1])
def test_the_wait_for_a_replica_is_part_of_the_time(
    num_losses: int, pair: tuple[Replica, Replica], loop: asyncio.Runner
) -> None:
    """The first replica's, and another's after a loss."""
    fleet = Waits(*pair[: num_losses + 1])
    fleet.losses = [EARLY] * num_losses
    whole = said(loop.run(relayed(fleet, **STREAM | {"max_tokens": 3000, "timeout": 0.5})))
    assert whole["choices"][0]["finish_reason"] == "timeout"
    origin = fleet.calls[-1].origin
    assert origin and origin.attempt == num_losses and 0.5 <= origin.age < 10
    if not num_losses:
        assert not whole["choices"][0].get("text")


def test_a_replica_tells_of_its_load(pair: tuple[Replica, Replica], loop: asyncio.Runner) -> None:
    service = pair[0].app.state.service
    loads: list[Load] = []

    class Watched(Fleet):
        async def ask(self, call: Call) -> AsyncGenerator[str | list[Message], None]:
            async with aclosing(super().ask(call)) as items:
                async for item in items:
                    loads.append(Meter(service, 9).load())
                    yield item

    for decoder in ("blt-s", "blt-d"):
        loop.run(relayed(Fleet(pair[0]), **STREAM | {"decoder": decoder}))
    loop.run(relayed(Watched(pair[0]), **STREAM | {"n": 2, "prompt": "x" * 300}))
    assert max(load.running for load in loads) == 2 and {load.places for load in loads} == {9}
    after = Meter(service, 9).load()
    assert (after.running, after.waiting, after.prompt_seconds) == (0, 0, 0.0)
    assert after.free == SETTINGS.max_queue and 0 < after.step_seconds < 1
    assert {"blt", "blt-s", "blt-d"} <= after.rates.output.keys() and all(after.rates.output.values())

    async def reports() -> list[bool]:
        meter = Meter(service, 9)
        return [meter.report() is not None for _ in range(3)]

    assert loop.run(reports()) == [True, False, False]


class Successor(ScriptedClient):
    """Says "c" after what another engine told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Delta] = []

    async def submit(self, request: Request, told: Sequence[Delta] = ()) -> AsyncGenerator[Event, None]:
        self.told += told
        usage = Usage(prompt_tokens=1, completion_tokens=2)
        yield Finished(id=request.id, reason="stop", text=b"c", usage=usage)


@pytest.mark.parametrize("prompt", ["dead", "dead later"])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_leaves_a_replica_whose_engine_is_gone(
    stream: bool, prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for one whose queue is full: it was admitted."""
    monkeypatch.setattr(ray_answer, "TELL_SECONDS", 60.0)
    gone, next = ScriptedClient(), Successor()
    fleet = Fleet(Replica("gone", create_app(SETTINGS, gone)), Replica("next", create_app(SETTINGS, next)))
    fleet.replicas[1].app.state.gate.capacity = 0
    messages = await relayed(fleet, model="scripted", prompt=prompt, stream=stream)
    for replica in fleet.replicas:
        replica.app.state.grammars.close()
    told = [b"a"] if stream and prompt == "dead later" else []
    assert said(messages)["choices"][0] | {"index": 0, "logprobs": None} == {
        "index": 0,
        "text": "ac" if told else "c",
        "finish_reason": "stop",
        "logprobs": None,
        "stop_reason": None,
    }
    assert [delta.text for delta in next.told] == told
    assert [call.origin and call.origin.is_continued for call in fleet.calls] == [False, True]
