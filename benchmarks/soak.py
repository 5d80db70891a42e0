"""A real server on models/nano for hours, broken at random: every stream is held against what an undisturbed one said.

A ledger has the answers to seeded requests of all decoders and kinds, asked once while nothing was broken. Then clients
ask for them again and again. Some read slowly, some leave in the middle, some set a deadline, which may cut the text
short and nothing else. Meanwhile the engine is killed, once or again as soon as another is ready, stopped for a moment,
or for so long that it is replaced; the HTTP process is stopped for a moment; crowds connect and vanish. It ends at the
first answer that is wrong, or with Ctrl-C. Each minute it writes what it has seen, and says so where no bar shows it.
"""

import argparse
import asyncio
import json
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from tqdm import tqdm

from tests.faults.asking import (
    Answer,
    Choice,
    Fields,
    engine_of,
    kill,
    mixed,
    new_engine,
    private_bytes,
    send,
    serving,
    talking,
    undisturbed,
    until_ready,
)
from tests.serving import RunningServer

from . import report

LEDGER = 90
"""Requests."""
CLIENTS = 24
FAULT_SECONDS = 15.0
"""Mean time between two faults."""
FAULTS = {"kill": 6, "kill twice": 3, "pause the engine": 3, "freeze the engine": 1, "pause the server": 2, "crowd": 2}
"""How often each is drawn."""
HABITS = {"read": 10, "read slowly": 2, "leave": 3, "deadline": 2}
CROWD = 200
SHORT_PAUSE, LONG_PAUSE = 3.0, 14.0
"""Seconds. A frozen engine is replaced after ten."""
SAMPLE_SECONDS = 60.0
MEMORY_FLAGS = ("--cache-bytes", str(1 << 27), "--max-connections-per-address", "4000")


@dataclass
class Seen:
    """What has happened. right: answers by the habit of their client. cut: by deadlines. memory: private bytes of
    server and engine, sampled each minute."""

    seed: int
    hours: float = 0.0
    right: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    bytes: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    memory: list[tuple[int, int]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class Soak:
    """One server, its clients and its faults."""

    def __init__(
        self,
        server: RunningServer,
        http: httpx.AsyncClient,
        seed: int,
        each_minute: Callable[[Seen], None] = lambda seen: None,
    ) -> None:
        self.seen = Seen(seed)
        self._each_minute = each_minute
        self._server = server
        self._http = http
        self._draw = random.Random(seed)
        self._requests = mixed(LEDGER, seed)
        self._expected: list[Answer] = []

    async def run(self, seconds: float) -> None:
        """For that long, or until an answer is wrong."""
        self._expected = await undisturbed(self._http, self._requests)
        began = time.monotonic()
        tasks = [asyncio.create_task(self._ask_on()) for _ in range(CLIENTS)]
        tasks += [asyncio.create_task(self._break_on()), asyncio.create_task(self._sample())]
        try:
            with tqdm(total=round(seconds), unit="s", disable=None) as bar:
                while time.monotonic() < began + seconds and not self.seen.wrong:
                    done, _ = await asyncio.wait(tasks, timeout=1.0, return_when="FIRST_COMPLETED")
                    for task in done:
                        task.result()
                    self.seen.hours = (time.monotonic() - began) / 3600
                    bar.update(round(time.monotonic() - began) - bar.n)
                    bar.set_postfix(answers=self.seen.right.total(), faults=self.seen.faults.total())
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask_on(self) -> None:
        while True:
            number = self._draw.randrange(len(self._requests))
            fields, right = self._requests[number], self._expected[number]
            habit = self._draw.choices(list(HABITS), list(HABITS.values()))[0]
            answer = Answer()
            # Cut short, the best of several may be another than the best of whole ones.
            if habit == "deadline" and "best_of" not in fields:
                fields = fields | {"timeout": self._draw.uniform(0.2, 4.0)}
            with suppress(_Left):
                await self._read(fields, answer, habit)
            self._judge(fields, answer, right, habit)

    async def _read(self, fields: Fields, answer: Answer, habit: str) -> None:
        """As `tests.faults.asking.ask`, but slowly, or not to the end. Raises _Left."""
        leaves_after = self._draw.randrange(1, 40) if habit == "leave" else None
        async with self._http.stream("POST", "/v1/completions", json=fields) as response:
            if not response.headers["content-type"].startswith("text/event-stream"):
                answer.add(json.loads(await response.aread()))
                answer.status = response.status_code
                return
            rest, pieces = b"", 0
            async for data in response.aiter_bytes():
                *events, rest = (rest + data).split(b"\n\n")
                for event in events:
                    if event.startswith(b"data: {"):
                        answer.add(json.loads(event.removeprefix(b"data: ")))
                pieces += 1
                if leaves_after is not None and pieces >= leaves_after:
                    raise _Left
                if habit == "read slowly":
                    await asyncio.sleep(self._draw.uniform(0, 0.2))

    def _judge(self, fields: Fields, answer: Answer, right: Answer, habit: str) -> None:
        self.seen.bytes += sum(len(choice.text.encode()) for choice in answer.choices.values())
        fault = str(answer.error) if answer.error else ""
        for index, choice in answer.choices.items():
            expected = right.choices[index]
            is_cut = habit == "leave" or choice.finish_reason == "timeout"
            self.seen.cut += choice.finish_reason == "timeout"
            if not (_begins(choice, expected) if is_cut else choice == expected):
                fault = f"choice {index}: {choice} instead of {expected}"
        if habit in ("read", "read slowly") and answer.choices.keys() != right.choices.keys():
            fault = fault or "choices are missing"
        if fault:
            self.seen.wrong.append(f"{habit}: {json.dumps(fields)}: {fault}"[:2000])
        else:
            self.seen.right[habit] += 1

    async def _break_on(self) -> None:
        while True:
            await asyncio.sleep(self._draw.expovariate(1 / FAULT_SECONDS))
            fault = self._draw.choices(list(FAULTS), list(FAULTS.values()))[0]
            # Counted first: what it does may be seen at once.
            self.seen.faults[fault] += 1
            await self._break(fault)

    async def _break(self, fault: str) -> None:
        server, draw = self._server, self._draw
        if fault == "crowd":
            await asyncio.gather(*(self._vanish() for _ in range(CROWD)))
        elif fault == "pause the server":
            await _stopped(server.process.pid, draw.uniform(0.1, SHORT_PAUSE))
        else:
            engine = engine_of(server)
            if not engine:
                return
            if fault == "pause the engine":
                await _stopped(engine, draw.uniform(0.1, SHORT_PAUSE))
            elif fault == "freeze the engine":
                await _stopped(engine, LONG_PAUSE)
            for _ in range({"kill": 1, "kill twice": 2}.get(fault, 0)):
                await new_engine(server, kill(server))
                await until_ready(self._http)
        await until_ready(self._http)

    async def _vanish(self) -> None:
        await asyncio.sleep(self._draw.uniform(0, 2))
        fields = self._requests[self._draw.randrange(len(self._requests))]
        with suppress(httpx.HTTPError, TimeoutError):
            async with asyncio.timeout(self._draw.uniform(0, 1)):
                await self._http.post("/v1/completions", json=fields)

    async def _sample(self) -> None:
        while True:
            if engine := engine_of(self._server):
                with suppress(OSError):
                    self.seen.memory.append((private_bytes(self._server.process.pid), private_bytes(engine)))
            self._each_minute(self.seen)
            await asyncio.sleep(SAMPLE_SECONDS)


class _Left(Exception):
    """The client went away."""


async def _stopped(pid: int, seconds: float) -> None:
    """SIGSTOP, and SIGCONT after so long if it still is there."""
    send(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        with suppress(ProcessLookupError):
            send(pid, signal.SIGCONT)


def _begins(part: Choice, whole: Choice) -> bool:
    """Whether it is the beginning of what was expected. A piece may end within a character, or within the string that
    would have stopped it, whose first bytes are not known for that yet."""
    text = part.text.rstrip("\ufffd")
    stop = whole.stop_reason if isinstance(whole.stop_reason, str) else ""
    ids, tokens, scores = len(part.ids), len(part.tokens), len(part.scores)
    return (
        (whole.text + stop).startswith(text)
        and whole.ids[:ids] == part.ids
        and whole.tokens[:tokens] == part.tokens
        and type(whole.scores)(whole.scores[:scores]) == part.scores
    )


async def soak(seconds: float, seed: int, each_minute: Callable[[Seen], None] = lambda seen: None) -> Seen:
    with TemporaryDirectory(prefix="soak-") as folder, serving(Path(folder), *MEMORY_FLAGS) as server:
        async with talking(server) as http:
            run = Soak(server, http, seed, each_minute)
            with suppress(asyncio.CancelledError):
                await run.run(seconds)
            return run.seen


def main(arguments: Sequence[str] | None = None) -> None:
    program = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    program.add_argument("--hours", type=float, default=1.0, help="(%(default)s)")
    program.add_argument("--seed", type=int, default=1, help="of requests, habits and faults (%(default)s)")
    program.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the JSON file")
    options = program.parse_args(arguments)
    command = f"python -m benchmarks.soak --hours {options.hours:g}"

    def write(seen: Seen) -> Path:
        content: dict[str, Any] = vars(seen) | {"right": dict(seen.right), "faults": dict(seen.faults)}
        return report.write("soak-nano", command, content, options.out)

    def each_minute(seen: Seen) -> None:
        write(seen)
        if not sys.stderr.isatty():
            print(said(seen), file=sys.stderr, flush=True)

    seen = asyncio.run(soak(options.hours * 3600, options.seed, each_minute))
    print(said(seen), write(seen), sep="\n")
    if seen.wrong:
        sys.exit(f"wrong: {seen.wrong[0]}")


def said(seen: Seen) -> str:
    """In one line."""
    faults = ", ".join(f"{count} {name}" for name, count in seen.faults.most_common())
    memory = ""
    if len(seen.memory) > 1:
        (server, engine), (server_at_end, engine_at_end) = (
            [round(size / 2**20) for size in sample] for sample in (seen.memory[1], seen.memory[-1])
        )
        memory = f"; private memory: server {server} MiB after a minute, {server_at_end} at the end, engine {engine}, "
        memory += f"{engine_at_end}"
    return (
        f"{seen.hours:.2f} h, {seen.right.total():,} answers and {seen.bytes:,} bytes right, {len(seen.wrong)} wrong, "
        f"{seen.cut} cut by their deadlines; {seen.faults.total()} faults: {faults}{memory}"
    )


if __name__ == "__main__":
    main()
