"""Runs one admitted completion request: takes engine events, yields pieces of choices."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

import msgspec

from engine.process.client import EngineClient, EngineDead
from engine.process.streams import Stream
from engine.types import Delta, Event, Failed, Finished, Request, TokenLogprob

from .admission import Gate, Ticket
from .base64_bytes import to_base64
from .choice import ChoiceStream, Piece
from .errors import ApiError, from_failed, internal_error
from .grammars import Grammars
from .merge import merge
from .metrics import Metrics
from .origin import Origin
from .requests import Plan
from .schemas import Choice, Completion, CompletionUsage, PromptTokensDetails
from .settings import ServerSettings
from .usage import fastblt_usage

LOGGED_CHARACTERS = 1000
"""Most characters of a text with `--log-content`."""


@dataclass
class Service:
    """The parts of the server that every request needs."""

    settings: ServerSettings
    client: EngineClient
    gate: Gate
    metrics: Metrics
    grammars: Grammars
    generations: dict[str, "Generation"] = field(default_factory=dict)
    """Under way, by their ids."""
    started: float = field(default_factory=time.time)

    def check_engine(self) -> None:
        """Raises ApiError while the engine is down."""
        if why := self.client.down(self.settings.restart_seconds):
            raise self.gate.unavailable(why, "engine_dead")


class Generation:
    """Must always be closed: that frees its place and aborts its sequences in the engine."""

    def __init__(
        self, service: Service, plan: Plan, origin: Origin, ticket: Ticket, arrived: float, received: float
    ) -> None:
        """arrived, received: when the request's head and all of its body had come here, by `time.perf_counter`."""
        self.admitted = time.perf_counter()
        self.arrived = arrived - origin.age
        self.plan = plan
        self.id = origin.id
        self._origin = origin
        self._service = service
        self._ticket = ticket
        self.clocks = [service.metrics.clock(plan.decoder, len(r.prompt_ids), received) for r in plan.requests]
        request = plan.request
        patching = service.client.limits.patching if request.patches else None
        self.streams = [
            ChoiceStream(
                r.prompt_ids,
                request.echo,
                request.logprobs is not None,
                request.trace,
                patching,
                with_ids=request.return_token_ids,
                with_bytes=request.return_bytes,
                num_top=request.logprobs or 0,
                num_prompt_top=request.prompt_logprobs,
            )
            for r in plan.requests
        ]
        self._scores: dict[int, _PromptScores] = {}
        """By the index of the sequence that computes them; empty unless prompts are scored."""
        events = [self._submit(index, r) for index, r in enumerate(plan.requests)]
        self._ended: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        self._events = merge(events, service.settings.keepalive_seconds, self._ended, self._came)
        self._begun: set[int] = set()
        self._rest = "abort"
        """How the sequences end that are still open at the end."""
        self.said = [""] * len(plan.requests) if service.settings.log_content else None
        """The beginning of each sequence's text, if it may be logged."""
        service.generations[self.id] = self

    @property
    def request_id(self) -> str:
        """Of the HTTP request; its client may have chosen it."""
        return self.plan.requests[0].log_fields["request_id"]

    @property
    def age(self) -> float:
        """Seconds since the request arrived."""
        return time.perf_counter() - self.arrived

    def unread_bytes(self) -> int:
        """About what it holds in memory because its client does not read."""
        return sum(self._service.client.unread_bytes(request.id) for request in self.plan.requests)

    def end(self, error: ApiError) -> None:
        """Ends all its sequences now, and makes `pieces` raise this error."""
        if not self._ended.done():
            self._ended.set_result(error)

    def _submit(self, index: int, request: Request) -> AsyncGenerator[Event, None]:
        """The events of one sequence. If prompts are scored, a prompt's first sample computes the scores and the others
        wait for it, so that they find the prompt in the prefix cache."""
        events = self._origin.all_events(index)
        if events and not isinstance(events[-1], Delta):
            self._ticket.begun()
            return _nothing()
        earlier = [event for event in events if isinstance(event, Delta)]
        request = _with_less_time(request, self._origin.age)
        if not self.plan.scores_prompts:
            return self._run(request, earlier)
        first = index - index % self.plan.samples
        scores = self._scores.setdefault(first, _PromptScores())
        return self._run(request, earlier) if index == first else self._submit_scored(request, earlier, scores)

    def _run(self, request: Request, earlier: list[Delta]) -> AsyncGenerator[Event, None]:
        run = self._service.client.submit if self._ticket.has_turn else self._run_in_turn
        return run(request, earlier)

    async def _run_in_turn(self, request: Request, earlier: list[Delta]) -> AsyncGenerator[Event, None]:
        """The wait for the turn is part of the sequence's time and of its time in the queue."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(request.timeout):
                await self._ticket.turn()
        except TimeoutError:
            overdue = Stream(request, earlier).overdue()
            usage = msgspec.structs.replace(overdue.usage, queue_seconds=time.monotonic() - began)
            yield msgspec.structs.replace(overdue, usage=usage)
            return
        waited = time.monotonic() - began
        async with aclosing(self._service.client.submit(_with_less_time(request, waited), earlier)) as events:
            async for event in events:
                if isinstance(event, Finished):
                    usage = msgspec.structs.replace(event.usage, queue_seconds=event.usage.queue_seconds + waited)
                    event = msgspec.structs.replace(event, usage=usage)
                yield event

    async def _submit_scored(
        self, request: Request, earlier: list[Delta], scores: "_PromptScores"
    ) -> AsyncGenerator[Event, None]:
        began = time.monotonic()
        await scores.known.wait()
        owed = [] if any(delta.prompt_logprobs for delta in earlier) else scores.entries
        async with aclosing(self._run(_with_less_time(request, time.monotonic() - began), earlier)) as events:
            async for event in events:
                if owed:
                    yield Delta(id=request.id, prompt_logprobs=owed)
                    owed = []
                yield event

    @property
    def first_byte(self) -> float | None:
        """When the first byte of any sequence came, by `time.perf_counter`."""
        return min((clock.first for clock in self.clocks if clock.first is not None), default=None)

    @property
    def first_byte_seconds(self) -> float | None:
        """From the request's arrival; None if no byte came yet."""
        if self._origin.first_byte_seconds is not None:
            return self._origin.first_byte_seconds
        return None if self.first_byte is None else round(self.first_byte - self.arrived, 6)

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece] | None, None]:
        """(sequence index, piece) as they come, without those that the client has from another server; None for a long
        silence. Raises ApiError if a sequence fails."""
        try:
            for index, events in self._origin.shown.items():
                for event in events:
                    self._feed(index, event)
                    if isinstance(event, Finished):
                        self.clocks[index].forget()
            for index, events in self._origin.held.items():
                for event in events:
                    yield index, self._take(index, event)
            async for item in self._events:
                if item is None:
                    yield None
                    continue
                index, event = item
                if self._origin.note:
                    self._origin.note(index, event)
                yield index, self._take(index, event)
            # An answer may be sent for long.
            self._scores.clear()
        except Exception as error:
            # It ends all of them. Nobody's fault is what the operator ends.
            by_us = not isinstance(error, ApiError) or error.status >= 500
            self._rest = "error" if by_us else "abort" if self._ended.done() else "refused"
            if isinstance(error, EngineDead):
                raise self._service.gate.unavailable(f"the engine is gone: {error}", "engine_dead") from error
            raise

    def _came(self, index: int, event: Event) -> None:
        """Counts a sequence as begun, however long its client takes to read. What was told elsewhere is no event here:
        a sequence that goes on waits for its turn."""
        if index not in self._begun:
            self._begun.add(index)
            self._ticket.begun()
        if scores := self._scores.get(index):
            scores.learn(event)

    def _take(self, index: int, event: Event) -> Piece:
        """Counts an event and makes a piece of it."""
        clock = self.clocks[index]
        if isinstance(event, Delta):
            clock.advance(len(event.ids))
            self._ticket.generated(len(event.ids))
        elif isinstance(event, Finished):
            # If it is read, no client has left.
            clock.end("error" if event.reason == "abort" else event.reason, event.usage)
        else:
            clock.end("error" if event.code == "internal" else "refused")
        return self._feed(index, event)

    def _feed(self, index: int, event: Event) -> Piece:
        if scores := self._scores.get(index):
            scores.learn(event)
        if isinstance(event, Failed):
            if event.code == "internal":
                raise internal_error(self.request_id, event.message)
            constraint = self.plan.constraint
            place = index // self.plan.samples if len(self.plan.requests) > self.plan.samples else None
            raise from_failed(constraint.named(event) if constraint else event, place)
        if isinstance(event, Finished) and event.reason == "abort":
            raise ApiError(500, "the engine gave up on this request", code="internal_error")
        piece = self.streams[index].feed(event)
        if self.said is not None:
            self.said[index] = (self.said[index] + piece.text)[: LOGGED_CHARACTERS + 1]
        return piece

    async def collect(self) -> Completion:
        """The whole response."""
        parts = [choice.empty_piece() for choice in self.streams]
        async for item in self.pieces():
            if item is not None:
                index, piece = item
                parts[index].add(piece)
        plan, n = self.plan, self.plan.request.n
        choices: list[Choice] = []
        for first in range(0, len(parts), plan.samples):
            samples = range(first, first + plan.samples)
            if n < plan.samples:
                samples = sorted(samples, key=lambda i: -self.streams[i].mean_logprob)  # type: ignore[assignment]
            choices += [self.choice(len(choices) + k, parts[i]) for k, i in enumerate(samples[:n])]
        return self.completion(choices, self.usage())

    def choice(self, index: int, piece: Piece) -> Choice:
        assert piece.finish_reason != "abort"
        ended, by = piece.finish_reason, piece.stop_reason
        if ended == "timeout" and self.plan.request.timeout is None:
            # A client that sent none of our fields may read OpenAI's reasons alone.
            ended, by = "length", "timeout"
        return Choice(
            index=index,
            text=piece.text,
            bytes=None if piece.data is None else to_base64(piece.data),
            logprobs=piece.logprobs,
            finish_reason=ended,
            stop_reason=by,
            prompt_token_ids=piece.prompt_token_ids,
            token_ids=piece.token_ids,
            prompt_logprobs=piece.prompt_logprobs,
            trace=piece.trace,
            patches=piece.patches,
        )

    def completion(self, choices: list[Choice], usage: CompletionUsage | None) -> Completion:
        return Completion(
            id=self.id,
            created=self._origin.created,
            model=self.plan.model,
            choices=choices,
            usage=usage,
        )

    def usage_so_far(self) -> CompletionUsage:
        """A prompt counts once, however many samples it has; every sample counts, returned or not."""
        prompt_tokens = self.plan.prompt_bytes
        completion_tokens = sum(stream.num_tokens for stream in self.streams)
        return CompletionUsage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
        )

    def usage(self) -> CompletionUsage:
        """After all sequences have ended: includes the cost."""
        usages = [choice.usage for choice in self.streams]
        so_far = self.usage_so_far()
        cached = sum(usage.cached_tokens for usage in usages[:: self.plan.samples])
        return CompletionUsage(
            prompt_tokens=so_far.prompt_tokens,
            completion_tokens=so_far.completion_tokens,
            total_tokens=so_far.total_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
            fastblt=fastblt_usage(self.plan.decoder, usages, self.first_byte_seconds),
        )

    async def close(self) -> None:
        """May be called again."""
        if self._service.generations.get(self.id) is self:
            del self._service.generations[self.id]
        try:
            await self._events.aclose()
        finally:
            for clock in self.clocks:
                clock.end(self._rest)
            self._ticket.close()


class _PromptScores:
    """Log-probabilities of a prompt, which all its samples show."""

    def __init__(self) -> None:
        self.known = asyncio.Event()
        self.entries: list[TokenLogprob] = []

    def learn(self, event: Event) -> None:
        """Takes scores from the sample that computes them; it may end without any."""
        if isinstance(event, Delta) and event.prompt_logprobs:
            self.entries = event.prompt_logprobs
        if self.entries or not isinstance(event, Delta):
            self.known.set()


async def _nothing() -> AsyncGenerator[Event, None]:
    """The rest of a sequence that has ended."""
    no_events: tuple[Event, ...] = ()
    for event in no_events:
        yield event


def _with_less_time(request: Request, seconds: float) -> Request:
    """The request after it has waited so long. Less than none is left of an overdue one: it has had a part of the time
    that is given to an engine after a deadline."""
    if request.timeout is None:
        return request
    return msgspec.structs.replace(request, timeout=request.timeout - seconds)
