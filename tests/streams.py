"""Reading streams of an engine client, and killing what feeds them."""

import os
import signal
from collections.abc import Callable

from engine.process.client import EngineClient
from engine.types import Delta, Failed, Finished, Request, TokenLogprob


class Transcript:
    """All that one stream said."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.text = b""
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob] = []
        self.entropies: list[float] = []
        self.patch_starts: list[int] = []
        self.deltas = 0
        self.last: Finished | Failed | None = None

    @property
    def finished(self) -> Finished:
        assert isinstance(self.last, Finished)
        return self.last


async def read(
    client: EngineClient, request: Request, on_delta: Callable[[Transcript], None] = lambda _: None
) -> Transcript:
    heard = Transcript()
    async for event in client.submit(request):
        assert event.id == request.id
        assert heard.last is None
        if isinstance(event, Delta):
            heard.deltas += 1
            heard.ids += event.ids
            heard.text += event.text
            heard.logprobs += event.logprobs
            heard.prompt_logprobs += event.prompt_logprobs
            heard.entropies += event.entropies
            heard.patch_starts += event.patch_starts
            on_delta(heard)
        else:
            heard.last = event
            heard.text += event.text if isinstance(event, Finished) else b""
    return heard


def kill(client: EngineClient, sign: signal.Signals = signal.SIGKILL) -> None:
    assert client.pid
    os.kill(client.pid, sign)


def killer(
    client: EngineClient, *lengths: int, spared: int = 0, sign: signal.Signals = signal.SIGKILL
) -> Callable[[Transcript], None]:
    """Kills one engine process after another: each when the stream has reached the next of `lengths`. spared: the
    processes that come before the first of them."""
    left = list(lengths)

    def on_delta(heard: Transcript) -> None:
        if left and len(heard.ids) >= left[0] and client.restarts == spared + len(lengths) - len(left):
            left.pop(0)
            kill(client, sign)

    return on_delta
