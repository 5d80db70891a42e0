"""An engine without a model, for tests of the process around it: its bytes follow from prompt and position alone.

What a prompt asks for comes true when the output has the length behind the colon: "exit:3" ends the process, "raise:3"
raises, "leave:3" raises while a thread has work, "starve:3" finds no memory, "hang:3" never comes back, "garble:3"
sends what is no event, "shout:3" logs more than can wait.
`EngineConfig.model` may say "exit" or "sleep" (while loading), else it must exist. A file has its fingerprint.
"""

import hashlib
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from engine.config import BYTE_OFFSET, EngineConfig, ModelLimits
from engine.process.log_writer import LIMIT_BYTES
from engine.stopping import StopMatcher
from engine.types import Delta, EngineInfo, Event, Finished, FinishReason, Request, Snapshot, TokenLogprob, Usage

STEP_SECONDS = 0.003
THREAD = ThreadPoolExecutor(1)


def prompt_ids(text: str) -> list[int]:
    return [byte + BYTE_OFFSET for byte in text.encode()]


def scripted_ids(prompt: str, start: int, end: int) -> list[int]:
    """The ids that follow the prompt; letters a to d, so that stop strings meet them."""
    return [BYTE_OFFSET + 97 + hashlib.sha256(f"{prompt}/{i}".encode()).digest()[0] % 4 for i in range(start, end)]


def scripted_logprob(position: int) -> float:
    return -0.1 * (position % 7 + 1)


class ScriptedEngine:
    """Adds one id to every request in each step."""

    def __init__(self, config: EngineConfig) -> None:
        if config.model == "exit":
            os._exit(3)
        if config.model == "sleep":
            time.sleep(60)
        if not Path(config.model).exists():
            raise ValueError(f"no model at {config.model}")
        model = Path(config.model)
        self.limits = ModelLimits(
            name="scripted",
            max_length=9999,
            vocab_size=260,
            block_size=None,
            pages={"byte": 8},
            fingerprint=model.read_text() if model.is_file() else "",
        )
        self._running: dict[str, _Run] = {}
        self._events: list[Event] = []
        self._steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._events)

    def add(self, request: Request) -> None:
        self._running[request.id] = _Run(request)

    def abort(self, request_id: str) -> None:
        if run := self._running.pop(request_id, None):
            self._events.append(run.finished("abort", b""))

    def step(self) -> list[Event]:
        time.sleep(STEP_SECONDS)
        self._steps += 1
        for run in list(self._running.values()):
            for event in run.step():
                self._events.append(event)
                if isinstance(event, Finished):
                    del self._running[run.request.id]
        events, self._events = self._events, []
        return events

    def step_bound(self) -> float:
        return STEP_SECONDS

    def calibrate(self) -> None:
        """All steps take the same time."""

    def info(self) -> EngineInfo:
        return EngineInfo(device="script")

    def snapshot(self) -> Snapshot:
        return Snapshot(running=len(self._running), steps=self._steps)

    def close(self) -> None:
        THREAD.shutdown(wait=False, cancel_futures=True)


class _Run:
    def __init__(self, request: Request) -> None:
        self.request = request
        self.deadline = time.monotonic() + (request.timeout or 3600)
        self.prompt = bytes(i - BYTE_OFFSET for i in request.prompt_ids).decode()
        self.num_output = 0
        self.matcher = StopMatcher(request.stop)
        self.stopped = b""
        self.sum = 0.0
        self.garbled = False
        self.prompt_scored = not request.prompt_logprobs
        for token in request.output_ids:
            self.append(token)
        assert request.output_ids == scripted_ids(self.prompt, 0, self.num_output)

    def append(self, token: int) -> bytes:
        self.num_output += 1
        text, self.stopped = self.matcher.feed(token - BYTE_OFFSET)
        return text

    def step(self) -> list[Event]:
        self.obey()
        if self.garbled:
            return [Delta(id=self.request.id, ids="no ids")]  # type: ignore[arg-type]
        if time.monotonic() > self.deadline:
            return [self.finished("timeout", self.matcher.flush())]
        events: list[Event] = []
        if not self.prompt_scored:
            self.prompt_scored = True
            scores = [TokenLogprob(i, -1.0, {}) for i in self.request.prompt_ids]
            events.append(Delta(id=self.request.id, prompt_logprobs=scores))
        if not self.over:
            position = self.num_output
            token = scripted_ids(self.prompt, position, position + 1)[0]
            logprobs = []
            if self.request.logprobs is not None:
                logprobs = [TokenLogprob(token, scripted_logprob(position), {})]
                self.sum += scripted_logprob(position)
            events.append(Delta(id=self.request.id, ids=[token], text=self.append(token), logprobs=logprobs))
        if self.over:
            tail = b"" if self.stopped else self.matcher.flush()
            events.append(self.finished("stop" if self.stopped else "length", tail))
        return events

    @property
    def over(self) -> bool:
        return bool(self.stopped) or self.num_output == self.request.max_tokens

    def obey(self) -> None:
        order, _, position = self.prompt.partition(":")
        if position != str(self.num_output):
            return
        match order:
            case "exit":
                os._exit(7)
            case "raise":
                raise FloatingPointError("scripted")
            case "leave":
                for _ in range(600):
                    THREAD.submit(time.sleep, 0.1)
                raise FloatingPointError("scripted")
            case "starve":
                raise MemoryError("scripted")
            case "hang":
                time.sleep(60)
            case "garble":
                self.garbled = True
            case "shout":
                logging.getLogger("fastblt.engine").info("a" * LIMIT_BYTES)

    def finished(self, reason: FinishReason, text: bytes) -> Finished:
        usage = Usage(prompt_tokens=len(self.prompt), completion_tokens=self.num_output)
        return Finished(
            id=self.request.id,
            reason=reason,
            text=text,
            stopped_by=self.stopped or None,
            usage=usage,
            cumulative_logprob=self.sum,
        )
