"""The engine's socket: garbage is refused by the decoder alone, and what is decoded never ends the engine.

An input is one message in MessagePack. A command goes to an engine with a small random model, beside a request whose
text must stay the same.
"""

import logging
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import torch

from engine import admission
from engine.checkpoint import PRESETS, random_tensors
from engine.engine import Engine
from engine.process import wire
from engine.types import Abort, Command, Delta, Failed, Finished, Request, SamplingParams, Shutdown, TokenLogprob
from tests.engines import make_engine, save_ours
from tests.fuzz.target import Target

STEPS = 24
"""After which a request that still runs is aborted."""
TYPE = msgspec.msgpack.encode("type")
NEIGHBOUR = Request(
    id="neighbour", prompt_ids=[1, 70, 71, 72], max_tokens=8, ignore_eos=True, sampling=SamplingParams(temperature=0)
)


def one(data: bytes) -> None:
    for decode in (wire.decode_command, wire.decode_message):
        try:
            message = decode(data)
        except ValueError:
            continue
        assert msgspec.msgpack.encode(decode(wire.encode(message))) == msgspec.msgpack.encode(message)
        # Members that no field has may be anything.
        with suppress(msgspec.DecodeError, UnicodeDecodeError, TypeError):
            given = msgspec.msgpack.decode(data, strict=False)
            assert data.count(TYPE) > 1 or given.get("type") == type(message).__name__
            _check_fields(msgspec.to_builtins(message), given)
        if isinstance(message, Request | Abort | Shutdown):
            _run(message)


def _check_fields(decoded: Any, given: Any) -> None:
    """Every known field has the value that the message gives it; given: as MessagePack alone reads it."""
    if isinstance(given, dict) and isinstance(decoded, dict):
        for name, value in given.items():
            if name in decoded:
                _check_fields(decoded[name], value)
    elif isinstance(given, list) and isinstance(decoded, list):
        for ours, theirs in zip(decoded, given, strict=True):
            _check_fields(ours, theirs)
    elif isinstance(given, int | str | None):
        # Numbers become floats where a field has these.
        expected = float(given) if isinstance(decoded, float) and isinstance(given, int) else given
        assert decoded == expected and isinstance(decoded, bool) == isinstance(given, bool), (decoded, given)


@cache
def _engine() -> tuple[Engine, list[int]]:
    """It, and the ids of the neighbour alone."""
    logging.getLogger("fastblt").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    config = PRESETS["tiny"]
    with tempfile.TemporaryDirectory() as folder:
        model = save_ours(Path(folder) / "model", (config, random_tensors(config, 0, torch.float32)))
        engine = make_engine(model, cache_bytes=8 << 20, max_length=256)
    engine.add(NEIGHBOUR)
    ids = list[int]()
    while engine.has_work:
        ids += [token for event in engine.step() if isinstance(event, Delta) for token in event.ids]
    return engine, ids


def _run(command: Command) -> None:
    engine, alone = _engine()
    engine.add(NEIGHBOUR)
    match command:
        case Request():
            engine.add(command)
        case Abort(id):
            # An id of the server's own making: here only unknown ones.
            engine.abort(id + "?")
    ids, ends = list[int](), list[str]()
    for step in range(STEPS + 16):
        if step == STEPS and isinstance(command, Request):
            engine.abort(command.id)
        for event in engine.step() if engine.has_work else []:
            if isinstance(event, Finished | Failed):
                ends.append(event.id)
            elif event.id == NEIGHBOUR.id:
                ids += event.ids
    assert not engine.has_work
    assert sorted(ends) == sorted([NEIGHBOUR.id, *([command.id] if isinstance(command, Request) else [])])
    assert ids == alone


def _decode_anything(data: bytes) -> Command:
    try:
        return wire._decode(wire._command_decoder, data)
    except ValueError:
        if b"Request" in data:
            return Shutdown()
        raise


def _message(kind: str, **fields: object) -> bytes:
    """Without the fields that have their defaults: a mutation then meets one that matters."""
    return msgspec.msgpack.encode({"type": kind, **fields})


TARGET = Target(
    one,
    seeds=[
        _message("Request", id="a", prompt_ids=[1, *range(60, 120)], max_tokens=3),
        _message("Request", id="b", prompt_ids=[1, 80], max_tokens=6, ignore_eos=True, trace=True, include_stop=True),
        _message("Request", id="c", prompt_ids=[1, 80], max_tokens=6, stop=[b"ab", b"c"], stop_ids=[5], min_tokens=2),
        _message("Request", id="d", prompt_ids=[1, 99], max_tokens=9, decoder="blt-d", block_size=4, output_ids=[70]),
        _message("Request", id="e", prompt_ids=[1, 99], max_tokens=9, decoder="blt-s", draft_length=4, timeout=9.0),
        _message("Request", id="f", prompt_ids=[5], max_tokens=2, sampling={"temperature": 0.5, "top_k": 3, "seed": 7}),
        _message("Request", id="g", prompt_ids=[5], max_tokens=2, sampling={"logit_bias": {70: 1.5}, "min_p": 0.1}),
        _message("Request", id="h", prompt_ids=[5], max_tokens=2, sampling={"allowed_ids": [70, 71], "top_p": 0.5}),
        _message("Request", id="i", prompt_ids=[1], max_tokens=0, prompt_logprobs=True, prompt_top=3, patches_from=0),
        _message("Request", id="j", prompt_ids=[1], max_tokens=2, logprobs=2, priority=-1, cache_salt=b"s"),
        _message("Request", id="k", prompt_ids=[1], max_tokens=1, decoder="blt-dv"),
        _message("Request", id="l", prompt_ids=[1], max_tokens=1, decoder="auto"),
        _message("Request", id="m", prompt_ids=[1], max_tokens=1, decoder="blt"),
        _message("Request", id="n", prompt_ids=[1], max_tokens=1, decoder="blt-s"),
        _message("Abort", id="a"),
        _message("Shutdown"),
        wire.encode(wire.StartFailed("no such folder")),
        wire.encode(wire.Scores("a", [TokenLogprob(5, -1.0, {6: -0.5})])),
        wire.encode(wire.Batch([Delta(id="a", ids=[70]), Failed(id="b", code="invalid", message="no")])),
    ],
    faults={
        "takes a garbled request for Shutdown": lambda: mock.patch.object(wire, "decode_command", _decode_anything),
        # No rule about ids or sizes: without those the native kernels would read beyond their tables.
        "takes any decoder": lambda: mock.patch.object(admission, "RULES", admission.RULES[1:]),
    },
    words=[
        *map(msgspec.msgpack.encode, (-1, 0, 1, 261, (1 << 64) - 1, -(1 << 63), float("nan"), float("inf"), -1e300)),
        *(b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc4\xff", b"\xa1\xff", b"\xc0", b"\xc3"),
    ],
)
