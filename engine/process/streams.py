"""The parent's side of a request in flight: what its reader has not fetched, and what a new engine needs to continue
it."""

import asyncio
import time
from collections.abc import Iterable

import msgspec

from ..config import text_of
from ..types import Delta, Event, Failed, Finished, Request, TokenLogprob, Trace, Usage

GRACE_SECONDS = 0.5
"""How long after its deadline a request may still be ended by the engine, which knows what it has cost, after the step
that runs."""
SCORE_BYTES, ALTERNATIVE_BYTES, ID_BYTES = 160, 60, 16
"""About what a log-probability takes in this process, each of its alternatives, and an id with its byte of text."""


class EngineDead(RuntimeError):
    """The engine process has ended and will not be restarted."""


class Stream:
    """A request in flight."""

    def __init__(self, request: Request, earlier: Iterable[Delta] = ()) -> None:
        """earlier: what an engine elsewhere has told of it; its reader has that."""
        self.request = request
        self.sent = False
        """Whether the current engine has it."""
        self.silent = True
        """Whether the current engine has told nothing of it."""
        self.fruitless_crashes = 0
        """Crashes in a row, without an event between them, while it was in flight."""
        self.lone_crashes = 0
        """Of these, those in which no other request was as suspect."""
        self.ended = False
        self._submitted = time.monotonic()
        self._output_ids = list(request.output_ids)
        self._num_text = 0
        self._logprob = 0.0
        self._prompt_scored = False
        self._scores: list[TokenLogprob] = []
        """Of the prompt, from the current engine, whose rest has not come."""
        self._num_entropies = 0
        self._times_sent = 0
        self._unread = Merged()
        self._taken_bytes = 0
        """Of the Delta that its reader took last, and may not have passed on."""
        self._last: Finished | Failed | EngineDead | None = None
        self._news = asyncio.Event()
        for delta in earlier:
            self._note(delta)
            self._times_sent = 1

    @property
    def length(self) -> int:
        """Ids that an engine reads before it can go on."""
        return len(self.request.prompt_ids) + len(self._output_ids)

    @property
    def has_output(self) -> bool:
        """Whether an engine has told something that depends on the model."""
        return bool(self._output_ids) or self._prompt_scored

    @property
    def unread_bytes(self) -> int:
        """About what its Deltas take that are not passed on."""
        return self._taken_bytes + self._unread.num_bytes

    def send(self) -> Request:
        """The request as the current engine gets it."""
        self.sent = self.silent = True
        self._scores = []
        self._times_sent += 1
        if self._times_sent == 1:
            return msgspec.structs.replace(self.request, submitted=self._submitted)
        return self._rest()

    def score(self, entries: list[TokenLogprob]) -> None:
        """Takes log-probabilities of the prompt, which its reader gets with the others."""
        self._scores += entries

    def put(self, event: Event) -> None:
        """Takes an event of the current engine."""
        self.silent = False
        self.fruitless_crashes = self.lone_crashes = 0
        if isinstance(event, Delta):
            if self._scores:
                event = msgspec.structs.replace(event, prompt_logprobs=self._scores + event.prompt_logprobs)
                self._scores = []
            self._note(event)
            self._unread.add(event)
            self._news.set()
        elif isinstance(event, Finished) and self._times_sent > 1:
            self.end(msgspec.structs.replace(event, cumulative_logprob=self._logprob))
        else:
            self.end(event)

    def end(self, last: Finished | Failed | EngineDead) -> None:
        """Gives it its last event."""
        if not self.ended:
            self.ended, self._last = True, last
            self._news.set()

    async def next(self) -> Event:
        """The next event, or all Deltas since the last call merged into one. A request that no engine ends at its
        deadline ends here, with what it has. Raises EngineDead."""
        timeout = self.request.timeout
        self._taken_bytes = 0
        if timeout is None:
            await self._news.wait()
        else:
            try:
                async with asyncio.timeout_at(
                    asyncio.get_running_loop().time() + self._submitted + timeout + GRACE_SECONDS - time.monotonic()
                ):
                    await self._news.wait()
            except TimeoutError:
                self.end(self.overdue())
        if not self._unread.empty:
            self._taken_bytes = self._unread.num_bytes
            delta, self._unread = self._unread.delta(self.request.id), Merged()
            if not self.ended:
                self._news.clear()
            return delta
        assert self._last
        if isinstance(self._last, EngineDead):
            raise self._last
        return self._last

    def _note(self, delta: Delta) -> None:
        self._output_ids += delta.ids
        self._num_text += len(delta.text)
        self._logprob += sum(entry.logprob or 0.0 for entry in delta.logprobs)
        self._prompt_scored |= bool(delta.prompt_logprobs)
        self._num_entropies += len(delta.entropies)

    def overdue(self) -> Finished:
        """With the text that the engine held back, as it would have released it itself."""
        usage = Usage(prompt_tokens=len(self.request.prompt_ids), completion_tokens=len(self._output_ids))
        held = text_of(self._output_ids[len(self.request.output_ids) :])[self._num_text :]
        return Finished(id=self.request.id, reason="timeout", text=held, usage=usage, cumulative_logprob=self._logprob)

    def _rest(self) -> Request:
        """The request for a new engine: it continues after the last event that arrived."""
        timeout, patches_from, now = self.request.timeout, self.request.patches_from, time.monotonic()
        return msgspec.structs.replace(
            self.request,
            output_ids=list(self._output_ids),
            prompt_logprobs=self.request.prompt_logprobs and not self._prompt_scored,
            patches_from=None if patches_from is None else patches_from + self._num_entropies,
            timeout=None if timeout is None else max(timeout - (now - self._submitted), 0.0),
            submitted=now,
        )


class Merged:
    """Deltas of one request as one."""

    def __init__(self) -> None:
        self.empty = True
        self.num_bytes = 0
        """About what they take in memory."""
        self._ids: list[int] = []
        self._text = bytearray()
        self._logprobs: list[TokenLogprob] = []
        self._traces: list[Trace] = []
        self._prompt_logprobs: list[TokenLogprob] = []
        self._entropies: list[float] = []
        self._patch_starts: list[int] = []

    def add(self, delta: Delta) -> None:
        self.empty = False
        self.num_bytes += ID_BYTES * (len(delta.ids) + len(delta.entropies) + sum(len(t.drafts) for t in delta.traces))
        for entry in (*delta.logprobs, *delta.prompt_logprobs):
            self.num_bytes += SCORE_BYTES + ALTERNATIVE_BYTES * len(entry.top)
        self._ids += delta.ids
        self._text += delta.text
        self._logprobs += delta.logprobs
        self._traces += delta.traces
        self._prompt_logprobs += delta.prompt_logprobs
        self._entropies += delta.entropies
        self._patch_starts += delta.patch_starts

    def delta(self, request_id: str) -> Delta:
        return Delta(
            id=request_id,
            ids=self._ids,
            text=bytes(self._text),
            logprobs=self._logprobs,
            traces=self._traces,
            prompt_logprobs=self._prompt_logprobs,
            entropies=self._entropies,
            patch_starts=self._patch_starts,
        )
