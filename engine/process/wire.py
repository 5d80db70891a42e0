"""The messages between the engine process and its parent, and their encoding on the socket (MessagePack)."""

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


Message = Started | StartFailed | Batch

_encoder = msgspec.msgpack.Encoder()
_command_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_message_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Command | Message) -> bytes:
    return _encoder.encode(message)


def decode_command(data: bytes) -> Command:
    return _command_decoder.decode(data)


def decode_message(data: bytes) -> Message:
    return _message_decoder.decode(data)
