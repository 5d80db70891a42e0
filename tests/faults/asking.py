"""Seeded requests of every kind, their answers over real sockets, and the processes of the server that is broken."""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import httpx
import pytest

from tests.serving import ROOT, RunningServer, running_server

NANO = ROOT / "models" / "nano"
DECODERS = ["blt", "blt-s", "blt-d", "blt-dv", "auto"]
PROMPTS = [
    "class Stack:\n    def __init__(self, ",
    "import os\nimport sys\n\n\ndef main(",
    "# naïve café: ",
    "def fibonacci(n: int) -> int:\n    ",
    "The quick brown fox ",
    "for key, value in sorted(items",
]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 90}, "size": {"type": "integer"}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
KINDS: list[dict[str, Any]] = [
    {},
    {"n": 3},
    {"logprobs": 3},
    {"stop": ["\n\n", "return"]},
    {"structured_outputs": {"json": SCHEMA}},
    {"structured_outputs": {"regex": "[a-z ]{60,200}"}},
    {"stream": False, "n": 2, "best_of": 3, "echo": True},
    {"return_token_ids": True, "patches": True, "prompt_logprobs": 1},
    {"presence_penalty": 0.5, "frequency_penalty": 0.4, "top_p": 0.9, "top_k": 40},
]
LATE = 2.0
"""Seconds that a loaded machine may add to what is promised."""
WAIT = 600.0
"""Seconds that a client waits for a byte; an engine that is killed each second makes few."""
RESTART = 90.0
"""Seconds in which a new engine must be there, on a loaded machine."""

Fields = dict[str, Any]
Record = Callable[[str, object], None]
"""pytest's `record_property`."""


def mixed(count: int, seed: int, most: int = 400) -> list[Fields]:
    """Requests of all decoders and kinds."""
    random, requests = Random(seed), []
    for number in range(count):
        kind, decoder = KINDS[number % len(KINDS)], DECODERS[number % len(DECODERS)]
        if decoder == "blt-d" and "structured_outputs" in kind:
            # Its blocks are not checked.
            decoder = "blt-dv"
        fields = {
            "model": f"nano:{decoder}",
            "prompt": PROMPTS[number % len(PROMPTS)] + str(random.randrange(1000)),
            "max_tokens": random.randint(most // 2, most),
            "seed": random.randrange(2**31),
            "temperature": random.choice([0.0, 0.7, 1.0]),
            "stream": True,
        }
        requests.append(fields | kind)
    return requests


def plain(number: int, max_tokens: int, **fields: Any) -> Fields:
    """A stream that does not end before its last byte."""
    prompt = PROMPTS[number % len(PROMPTS)] + str(number)
    return {"model": "nano", "prompt": prompt, "max_tokens": max_tokens, "seed": number, "ignore_eos": True} | (
        {"stream": True} | fields
    )


class Scores(list[float]):
    """Log-probabilities. They are equal up to what rounding may do."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scores) and list(self) == pytest.approx(list(other), abs=1e-3)


@dataclass
class Choice:
    """What must not depend on a fault."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: object = None
    scores: Scores = field(default_factory=Scores)
    prompt_scores: Scores = field(default_factory=Scores)
    entropies: Scores = field(default_factory=Scores)
    starts: list[int] = field(default_factory=list)
    """Of patches."""

    def add(self, part: dict[str, Any]) -> None:
        self.text += part["text"]
        self.ids += part.get("token_ids") or []
        if scores := part.get("logprobs"):
            self.tokens += scores["tokens"]
            # The first of an echoed prompt has no score.
            self.scores += [score for score in scores["token_logprobs"] if score is not None]
        for entry in part.get("prompt_logprobs") or []:
            self.prompt_scores += [entry[token]["logprob"] for token in sorted(entry or {})]
        if patches := part.get("patches"):
            self.starts += patches["starts"]
            self.entropies += patches["entropies"]
        self.finish_reason = part["finish_reason"] or self.finish_reason
        self.stop_reason = part.get("stop_reason") or self.stop_reason


@dataclass
class Answer:
    """status: of an error in a stream that had begun, too. times: of each event, by `time.monotonic`."""

    status: int = 200
    error: dict[str, Any] = field(default_factory=dict)
    choices: dict[int, Choice] = field(default_factory=dict)
    times: list[float] = field(default_factory=list, compare=False)

    def add(self, event: dict[str, Any]) -> None:
        self.times.append(time.monotonic())
        if "error" in event:
            self.error = event["error"]
            self.status = {"engine_dead": 503}.get(self.error["code"], 500)
        for part in event.get("choices", []):
            self.choices.setdefault(part["index"], Choice()).add(part)

    @property
    def reasons(self) -> set[str | None]:
        return {choice.finish_reason for choice in self.choices.values()}


async def ask(http: httpx.AsyncClient, fields: Fields, answer: Answer | None = None) -> Answer:
    """answer: is filled while it comes."""
    answer = answer or Answer()
    async with http.stream("POST", "/v1/completions", json=fields) as response:
        if response.headers["content-type"].startswith("text/event-stream"):
            rest = b""
            async for data in response.aiter_bytes():
                # Not by lines: to Python, and so to httpx, other characters end lines, too.
                *events, rest = (rest + data).split(b"\n\n")
                for event in events:
                    if event.startswith(b"data: {"):
                        answer.add(json.loads(event.removeprefix(b"data: ")))
        else:
            answer.add(json.loads(await response.aread()))
            answer.status = response.status_code
    return answer


async def ask_all(http: httpx.AsyncClient, requests: list[Fields]) -> list[Answer]:
    return list(await asyncio.gather(*(ask(http, fields) for fields in requests)))


async def undisturbed(http: httpx.AsyncClient, requests: list[Fields]) -> list[Answer]:
    """What these must answer, whatever happens."""
    answers = await ask_all(http, requests)
    for fields, answer in zip(requests, answers, strict=True):
        assert answer.status == 200 and None not in answer.reasons, (fields, answer.error)
    return answers


def check(requests: list[Fields], answers: list[Answer], expected: list[Answer]) -> None:
    """Every answer is as expected; tells of the first that is not."""
    for fields, answer, right in zip(requests, answers, expected, strict=True):
        assert answer.error == right.error, fields
        for index, choice in right.choices.items():
            assert answer.choices[index] == choice, fields
        assert answer == right, fields


@asynccontextmanager
async def talking(server: RunningServer) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=server.url, timeout=WAIT, limits=limits) as http:
        yield http


@contextmanager
def serving(folder: Path, *flags: str, model: Path = NANO, prefix: tuple[str, ...] = ()) -> Iterator[RunningServer]:
    with running_server(model, folder / "server.log", *flags, prefix=prefix) as server:
        yield server


class Streams(NamedTuple):
    """Requests under way, which the server has answered undisturbed before."""

    server: RunningServer
    http: httpx.AsyncClient
    requests: list[Fields]
    expected: list[Answer]
    answers: asyncio.Future[list[Answer]]

    async def check(self) -> None:
        """Waits for the answers. They are as before."""
        answers = await self.answers
        check(self.requests[: len(answers)], answers, self.expected[: len(answers)])


@asynccontextmanager
async def under_way(
    folder: Path, requests: list[Fields], *flags: str, model: Path = NANO, count: int | None = None
) -> AsyncIterator[Streams]:
    """Of a server of its own. count: how many of the requests are asked again; by default all."""
    with serving(folder, *flags, model=model) as server:
        async with talking(server) as http:
            expected = await undisturbed(http, requests)
            answers = asyncio.gather(*(ask(http, fields) for fields in requests[:count]))
            await asyncio.sleep(0.3)
            yield Streams(server, http, requests, expected, answers)


def engine_of(server: RunningServer) -> int | None:
    """The engine's process, if there is one."""
    return child_engine(server.process.pid)


def child_engine(pid: int) -> int | None:
    """The same of the server with this process id."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        try:
            if b"engine.process.child" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
        except OSError:
            continue
    return None


async def until(condition: Callable[[], bool], seconds: float = RESTART) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what it waits for is in another process
            await asyncio.sleep(0.02)


async def new_engine(server: RunningServer, old: int | None = None) -> int:
    """A process that may still load."""
    await until(lambda: engine_of(server) not in (None, old))
    pid = engine_of(server)
    assert pid
    return pid


def send(pid: int | None, number: signal.Signals) -> int:
    assert pid
    os.kill(pid, number)
    return pid


def kill(server: RunningServer) -> int:
    """Kills the engine; returns what its process id was."""
    return send(engine_of(server), signal.SIGKILL)


async def is_ready(http: httpx.AsyncClient) -> bool:
    return (await http.get("/health/ready")).status_code == 200


async def until_ready(http: httpx.AsyncClient, ready: bool = True, seconds: float = RESTART) -> float:
    """Seconds that it took."""
    began = time.monotonic()
    while await is_ready(http) != ready:
        assert time.monotonic() - began < seconds, f"not {'ready' if ready else 'unready'} within {seconds} s"
        await asyncio.sleep(0.05)
    return time.monotonic() - began


async def killed(server: RunningServer, http: httpx.AsyncClient) -> float:
    """Kills the engine and waits until there is another; returns how long that took."""
    began = time.monotonic()
    await new_engine(server, kill(server))
    await until_ready(http)
    return time.monotonic() - began


def private_bytes(pid: int) -> int:
    """Memory that only this process has."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in rollup if line.startswith("Private_"))
