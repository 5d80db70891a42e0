"""Where answers come from: an engine in this process, or a running server."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

from engine.config import BYTE_OFFSET, EOS_ID, EngineConfig, is_byte
from engine.layout import CONFIG, PARAMS, TRAIN_ARGS, WEIGHTS_INDEX
from engine.types import DecoderName, Delta, Failed, Finished, Request, SamplingParams, Usage

from ..offline import prompt_ids
from .results import COSTS, Answer
from .settings import Setting
from .tasks import Problem

IN_FLIGHT = 2
"""Requests that the engine holds at once, in multiples of the running batch: so a next one waits when one ends."""
TRIES = 5
"""How often a server is asked for an answer whose costs it has not counted: `usage` has the work of the last engine
alone if one was lost."""
OTHER_SERVER = "this is not a fastblt server of this version"
DESCRIPTIONS = (CONFIG, PARAMS, TRAIN_ARGS, WEIGHTS_INDEX)
SAMPLE = 1 << 20
"""Bytes that are looked at in three places of a file, as all of a large model would take minutes."""


class SourceError(RuntimeError):
    """A problem got no answer."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A problem to continue greedily by exactly `num_bytes`, beyond any end of sequence, as the paper counts (4.2).
    key: whose answer it is."""

    key: Any
    problem: Problem
    setting: Setting
    num_bytes: int


class Source(Protocol):
    """model: its name. about: all that answers depend on besides the question."""

    model: str
    about: dict[str, Any]
    decoders: tuple[DecoderName, ...]
    block_size: int | None

    def answers(self, asked: Iterable[Asked]) -> Iterator[tuple[Asked, Answer]]:
        """In the order in which they come. Raises SourceError for one without, and gives before the answers to all that
        was asked by then."""
        ...


class InProcess:
    """An engine here, which runs as many problems at once as fit its batch."""

    def __init__(self, config: EngineConfig) -> None:
        """Raises what loading raises."""
        from engine.engine import Engine  # torch takes seconds to import, which --help should not

        self._engine = Engine(config)
        limits = self._engine.limits
        self.model, self.decoders, self.block_size = limits.name, limits.decoders, limits.block_size
        self.about: dict[str, Any] = {
            "model": self.model,
            "files": fingerprint(Path(config.model), Path(config.patcher) if config.patcher else None),
            "parameters": limits.parameters,
            "dtype": config.dtype,
            "weights": config.weights or config.dtype,
            "patching_threshold": limits.patching.threshold,
        }

    def answers(self, asked: Iterable[Asked]) -> Iterator[tuple[Asked, Answer]]:
        waiting = iter(asked)
        live: dict[str, Asked] = {}
        ids: dict[str, list[int]] = {}
        number = 0
        more = True
        failure: SourceError | None = None
        while more or live:
            while more and len(live) < IN_FLIGHT * self._engine.config.max_sequences:
                if (one := next(waiting, None)) is None:
                    more = False
                    break
                name, number = str(number), number + 1
                live[name], ids[name] = one, []
                self._engine.add(_request(name, one))
            for event in self._engine.step() if live else ():
                match event:
                    case Delta(id=name, ids=new):
                        ids[name] += new
                    case Finished(id=name, usage=usage):
                        yield live.pop(name), _answer(ids.pop(name), usage)
                    case Failed(id=name, message=message):
                        failure, more = failure or _failed(live.pop(name), message), False
        if failure:
            raise failure


def fingerprint(model: Path, patcher: Path | None = None) -> str:
    """Tells checkpoints of the same name apart: a digest of the sizes and some of the content of the files that loading
    reads, the patcher's among them. Others in their folders do not count, as results may be written there.

    Raises CheckpointError, OSError.
    """
    from engine.checkpoint import load  # torch, as above

    weights = load(model, patcher=patcher).files
    # Wherever both lie, the patcher's folder comes second.
    folders = sorted({path.parent for path in weights}, key=lambda folder: folder != model)
    described = [folder / name for folder in folders for name in DESCRIPTIONS]
    read = [(folders.index(path.parent), path) for path in {*weights, *filter(Path.exists, described)}]
    digest = hashlib.sha256()
    for number, path in sorted(read):
        size = path.stat().st_size
        digest.update(f"{number} {path.name} {size}".encode())
        with path.open("rb") as file:
            for start in (0, size // 2, max(0, size - SAMPLE)):
                file.seek(start)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:16]


Send = Callable[[Iterable[tuple[Asked, dict[str, Any]]]], Iterator[tuple[Asked, dict[str, Any]]]]
"""Posts bodies to `/v1/completions`, many at a time, and gives each response with what came beside its body."""


class OverHttp:
    """A running server. version: the answer of its `/version`. model: one of its names; None takes the first. Raises
    SourceError for another kind of server."""

    def __init__(self, version: Mapping[str, Any], model: str | None, send: Send) -> None:
        self._model, self._send = model, send
        try:
            self.model, self.decoders = version["model"], tuple(version["decoders"])
            self.block_size: int | None = version["block_size"]
            self.about: dict[str, Any] = {"model": model or self.model, "parameters": version["parameters"]}
        except (LookupError, TypeError):
            raise SourceError(f"{OTHER_SERVER}: its /version is {str(dict(version))[:80]}") from None

    def answers(self, asked: Iterable[Asked]) -> Iterator[tuple[Asked, Answer]]:
        failures: list[SourceError] = []
        for _ in range(TRIES):
            again = []
            going = takewhile(lambda _: not failures, asked)
            for one, response in self._send((one, self._body(one)) for one in going):
                try:
                    found = _answer_of(one, response)
                except SourceError as error:
                    failures.append(error)
                    continue
                if found:
                    yield one, found
                else:
                    again.append(one)
            if failures:
                raise failures[0]
            if not again:
                return
            asked = again
        raise _failed(again[0], f"the server lost its engine {TRIES} times, and did not count all of the work")

    def _body(self, one: Asked) -> dict[str, Any]:
        named = {"model": self._model} if self._model else {}
        body = {"prompt": one.problem.prompt, "max_tokens": one.num_bytes, "temperature": 0, "ignore_eos": True}
        return named | body | {"return_token_ids": True} | one.setting.body


def _answer_of(one: Asked, response: Mapping[str, Any]) -> Answer | None:
    """None where some of the work was not counted. Raises SourceError."""
    try:
        (choice,), usage = response["choices"], response["usage"]
        if (generated := usage["completion_tokens"]) != one.num_bytes:
            raise _failed(one, f"ended after {generated} bytes: {choice['stop_reason'] or choice['finish_reason']}")
        # A round gives one byte beyond what it accepts, at most.
        if (cost := usage["fastblt"])["rounds"] + cost["accepted"] < generated:
            return None
        return Answer(_text(choice["token_ids"]), **{name: cost[name] for name in COSTS})
    except (LookupError, TypeError, ValueError):
        raise _failed(one, f"{OTHER_SERVER}: it answers {str(response)[:80]}") from None


def _request(name: str, one: Asked) -> Request:
    return Request(
        id=name,
        prompt_ids=prompt_ids(one.problem.prompt.encode()),
        max_tokens=one.num_bytes,
        sampling=SamplingParams(temperature=0),
        ignore_eos=True,
        decoder=one.setting.decoder,
        **one.setting.options,
    )


def _failed(one: Asked, why: str) -> SourceError:
    return SourceError(f"{one.problem.id}, {one.setting.name}: {why}")


def _answer(ids: list[int], usage: Usage) -> Answer:
    return Answer(_text(ids), **{name: getattr(usage, name) for name in COSTS})


def _text(ids: list[int]) -> str:
    """Up to an end of sequence; other special ids are left out."""
    end = ids.index(EOS_ID) if EOS_ID in ids else len(ids)
    return bytes(token - BYTE_OFFSET for token in ids[:end] if is_byte(token)).decode(errors="replace")
