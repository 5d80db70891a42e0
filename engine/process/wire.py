"""The messages between the engine process and its parent, and their encoding on the socket (MessagePack)."""

from typing import TypeVar

import msgspec

from ..config import ModelLimits
from ..types import Command, EngineInfo, Event, Snapshot


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


OUT_OF_MEMORY = 12
"""Exit code of an engine that found no memory for a step."""

T = TypeVar("T")

Message = Started | StartFailed | Batch

_encoder = msgspec.msgpack.Encoder()
_command_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_message_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Command | Message) -> bytes:
    return _encoder.encode(message)


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
