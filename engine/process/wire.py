"""The messages between the engine process and its parent, and their encoding on the socket (MessagePack)."""

from collections.abc import Iterator
from typing import TypeVar

import msgspec

from ..config import ModelLimits
from ..types import Command, Delta, EngineInfo, Event, Snapshot, TokenLogprob


class Started(msgspec.Struct, frozen=True, tag=True):
    """The first message of an engine process: the model is loaded."""

    limits: ModelLimits
    info: EngineInfo
    snapshot: Snapshot


class StartFailed(msgspec.Struct, frozen=True, tag=True):
    """The first and only message of an engine process that could not load its model."""

    message: str


class Batch(msgspec.Struct, frozen=True, tag=True):
    """The events of one step, and perhaps a snapshot."""

    events: list[Event]
    snapshot: Snapshot | None = None


class Scores(msgspec.Struct, frozen=True, tag=True):
    """Log-probabilities of a prompt; the rest comes with the request's next Delta."""

    id: str
    entries: list[TokenLogprob]


SCORES_AT_ONCE = 1 << 14
"""Most log-probabilities of a prompt in one message. It takes some milliseconds to decode."""
OUT_OF_MEMORY = 12
"""Exit code of an engine that found no memory for a step."""

T = TypeVar("T")

Message = Started | StartFailed | Batch | Scores

_encoder = msgspec.msgpack.Encoder()
_command_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_message_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Command | Message) -> bytes:
    return _encoder.encode(message)


def messages(events: list[Event], snapshot: Snapshot | None) -> Iterator[Message]:
    """What a step has to tell. None of them is so long that its reader could do nothing else meanwhile."""
    rest = list[Event]()
    for event in events:
        if isinstance(event, Delta) and event.prompt_logprobs:
            entries = event.prompt_logprobs
            each = max(SCORES_AT_ONCE // (len(entries[-1].top) + 1), 1)
            *parts, last = [entries[at : at + each] for at in range(0, len(entries), each)]
            yield from (Scores(event.id, part) for part in parts)
            event = msgspec.structs.replace(event, prompt_logprobs=last)
        rest.append(event)
    yield Batch(rest, snapshot)


def decode_command(data: bytes) -> Command:
    """Raises ValueError."""
    return _decode(_command_decoder, data)


def decode_message(data: bytes) -> Message:
    """Raises ValueError."""
    return _decode(_message_decoder, data)


def _decode(decoder: msgspec.msgpack.Decoder[T], data: bytes) -> T:
    try:
        return decoder.decode(data)
    except msgspec.DecodeError as error:
        raise ValueError(f"not a message: {error}") from error
