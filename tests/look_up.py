"""A decoder that is not fastblt's: a file and a row of the table. `python -m tests.look_up` is `fastblt` with it."""

from collections.abc import Sequence
from functools import partial
from itertools import takewhile

from engine.config import EngineConfig, is_byte
from engine.decoders import Decoder, DecoderSpec, Round, SequenceView, register
from engine.decoders.phrases import can_draft, one_byte, verify
from engine.process.child import EngineLike

WORD = 3


class LookUp(Decoder):
    """Prompt look-up: drafts what followed the last bytes where they stood before, and lets the model verify it."""

    def __init__(self, draft_length: int) -> None:
        self._draft_length = draft_length

    def round(self, sequence: SequenceView, room: int) -> Round:
        drafts = looked_up(sequence.ids, min(self._draft_length, room - 1, sequence.tokens_left - 1))
        if not can_draft(sequence) or not drafts:
            return (yield from one_byte())
        return (yield from verify(drafts, exact=0))


def looked_up(ids: Sequence[int], most: int) -> list[int]:
    """At most so many bytes that followed the last earlier occurrence of the last `WORD` ids."""
    for end in range(len(ids) - 1, WORD - 1, -1):
        if ids[end - WORD : end] == ids[-WORD:]:
            return list(takewhile(is_byte, ids[end : end + max(most, 0)]))
    return []


register(
    DecoderSpec(
        name="look-up",
        about="Drafts what followed the last bytes before, verified by the model.",
        options=("draft_length",),
        make=lambda request, setting: LookUp(request.draft_length),
    )
)


def make_engine(config: EngineConfig) -> EngineLike:
    """In the engine's process, which knows the row because it imports this."""
    from engine.engine import Engine

    return Engine(config)


if __name__ == "__main__":
    from server import cli, lifecycle

    lifecycle.EngineClient = partial(lifecycle.EngineClient, engine_factory="tests.look_up:make_engine")  # type: ignore[assignment, misc]
    cli.main()
