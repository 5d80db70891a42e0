"""Generation without a server: the engine in this process, as `fastblt generate` runs it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from engine.config import BOS_ID, BYTE_OFFSET, EngineConfig
from engine.types import DecoderName, Delta, Failed, Finished, Request, SamplingParams, Trace

from .generation import fastblt_usage


@dataclass(frozen=True, slots=True)
class Piece:
    """Certain bytes of one prompt's continuation; the last piece also says how it ended."""

    index: int
    data: bytes
    ids: list[int] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)
    end: Finished | Failed | None = None


def generate(
    config: EngineConfig,
    prompts: list[bytes],
    *,
    max_tokens: int,
    sampling: SamplingParams,
    stop: list[bytes],
    ignore_eos: bool,
    decoder: DecoderName,
    options: dict[str, Any],
    trace: bool = False,
) -> Iterator[Piece]:
    """Continues all prompts as one batch. Raises what loading raises: CheckpointError, ValueError, RuntimeError."""
    from engine.engine import Engine  # torch takes seconds to import, which --help should not

    engine = Engine(config)
    for index, prompt in enumerate(prompts):
        engine.add(
            Request(
                id=str(index),
                prompt_ids=[BOS_ID, *(byte + BYTE_OFFSET for byte in prompt)],
                max_tokens=max_tokens,
                sampling=sampling,
                stop=stop,
                ignore_eos=ignore_eos,
                decoder=decoder,
                trace=trace,
                **options,
            )
        )
    while engine.has_work:
        for event in engine.step():
            match event:
                case Delta(id=name, text=text):
                    yield Piece(int(name), text, event.ids, event.traces)
                case Finished(id=name, text=text):
                    yield Piece(int(name), text, end=event)
                case Failed(id=name):
                    yield Piece(int(name), b"", end=event)


def result(data: bytes, end: Finished | Failed, decoder: DecoderName) -> dict[str, Any]:
    """What `generate --json` prints for one prompt; `usage` is shaped as in an HTTP response."""
    if isinstance(end, Failed):
        return {"error": {"code": end.code, "message": end.message, "param": end.param}}
    prompt, completion = end.usage.prompt_tokens, end.usage.completion_tokens
    return {
        "text": data.decode(errors="replace"),
        "bytes": data.hex(),
        "finish_reason": end.reason,
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "fastblt": fastblt_usage(decoder, [end.usage]).model_dump(),
        },
    }
