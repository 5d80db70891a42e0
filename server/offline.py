"""Generation without a server: the engine in this process, as `fastblt generate` runs it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from engine.config import BOS_ID, BYTE_OFFSET, EngineConfig
from engine.grammars import GrammarError, compiled
from engine.types import DecoderName, Delta, Failed, Finished, Request, SamplingParams, Trace

from .choice import ChoiceStream
from .grammar_worker import essence, fault_of_texts
from .schemas import Patches
from .structured import Grammar, TextConstraint, from_choices, from_json_schema, from_lark, from_regex
from .usage import fastblt_usage


@dataclass(frozen=True, slots=True)
class Piece:
    """Final bytes of one prompt's continuation; the last piece also has how it ended."""

    index: int
    data: bytes
    ids: list[int] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)
    patches: Patches | None = None
    end: Finished | Failed | None = None


def prompt_ids(prompt: bytes) -> list[int]:
    """A begin-of-sequence id and the bytes."""
    return [BOS_ID, *(byte + BYTE_OFFSET for byte in prompt)]


def constraint_of_flags(
    json_schema: str | None, regex: str | None, choices: list[str], lark: str | None
) -> TextConstraint | None:
    """None without any of them. Raises ValueError for two of them, WrongGrammar for one that cannot be used."""
    asked: dict[str, Callable[[str], Grammar]] = {}
    if json_schema is not None:
        asked["--json-schema"] = lambda flag: from_json_schema(flag, json_schema)
    if regex is not None:
        asked["--regex"] = lambda flag: from_regex(flag, regex)
    if choices:
        asked["--choice"] = lambda flag: from_choices(flag, choices)
    if lark is not None:
        asked["--grammar"] = lambda flag: from_lark(flag, lark)
    if len(asked) > 1:
        raise ValueError(f"{' and '.join(asked)} cannot be combined")
    for flag, make in asked.items():
        grammar = make(flag)
        try:
            fault = fault_of_texts(compiled(grammar.text))
        except GrammarError as error:
            fault = essence(str(error))
        if fault:
            raise grammar.fault(fault)
        return TextConstraint(flag, grammar.text, [grammar])
    return None


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
    constraint: TextConstraint | None = None,
    trace: bool = False,
    patches: bool = False,
) -> Iterator[Piece]:
    """Continues all prompts as one batch. Raises what loading raises: CheckpointError, ValueError, RuntimeError."""
    from engine.engine import Engine  # torch takes seconds to import, which --help should not

    engine = Engine(config)
    choices: list[ChoiceStream] = []
    for index, prompt in enumerate(prompts):
        ids = prompt_ids(prompt)
        if patches:
            choices.append(ChoiceStream(ids, echo=False, with_logprobs=False, patching=engine.limits.patching))
        engine.add(
            Request(
                id=str(index),
                prompt_ids=ids,
                max_tokens=max_tokens,
                sampling=sampling,
                stop=stop,
                ignore_eos=ignore_eos,
                grammar=constraint.grammar if constraint else "",
                decoder=decoder,
                trace=trace,
                patches_from=0 if patches else None,
                **options,
            )
        )
    while engine.has_work:
        for event in engine.step():
            index = int(event.id)
            new = choices[index].feed(event).patches if patches and not isinstance(event, Failed) else None
            match event:
                case Delta(text=text):
                    yield Piece(index, text, event.ids, event.traces, new)
                case Finished(text=text):
                    yield Piece(index, text, patches=new, end=event)
                case Failed():
                    yield Piece(index, b"", end=constraint.named(event) if constraint else event)


def result(data: bytes, patches: list[Patches], end: Finished | Failed, decoder: DecoderName) -> dict[str, Any]:
    """The object that `generate --json` prints for one prompt. `usage`, and `patches` if requested, are shaped as in an
    HTTP response."""
    if isinstance(end, Failed):
        return {"error": {"code": end.code, "message": end.message, "param": end.param}}
    for later in patches[1:]:
        patches[0].add(later)
    prompt, completion = end.usage.prompt_tokens, end.usage.completion_tokens
    return {
        "text": data.decode(errors="replace"),
        "bytes": data.hex(),
        "finish_reason": end.reason,
        **({"patches": patches[0].model_dump()} if patches else {}),
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "fastblt": fastblt_usage(decoder, [end.usage]).model_dump(),
        },
    }
