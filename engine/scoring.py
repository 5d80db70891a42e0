"""How well a model predicts texts: the log-probability of each byte by the engine's own prefill."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, TypeVar

from .engine import Engine
from .types import Delta, Failed, Request

IN_FLIGHT = 2
"""Texts that the engine holds at once, in multiples of the running batch: so a next one waits when one ends."""


class Text(Protocol):
    """The ids of a text. The first `num_known` after BOS are context and not scored."""

    @property
    def ids(self) -> list[int]: ...

    @property
    def num_known(self) -> int: ...


Given = TypeVar("Given", bound=Text)


class Refused(ValueError):
    """The engine refuses a text."""


@dataclass(frozen=True, slots=True)
class Score:
    """nats: the sum over all scored ids. patches: how many begin with a scored id."""

    nats: float
    patches: int


def score(engine: Engine, texts: Iterable[Given]) -> Iterator[tuple[Given, Score]]:
    """Scores texts, many at a time, and yields each when it is done. A text's score does not depend on the others.
    Raises Refused if the engine refuses one."""
    waiting = iter(texts)
    live: dict[str, Given] = {}
    nats: dict[str, float] = {}
    number = 0
    while True:
        for text in islice(waiting, IN_FLIGHT * engine.config.max_sequences - len(live)):
            live[str(number)] = text
            asked = Request(id=str(number), prompt_ids=text.ids, max_tokens=0, prompt_logprobs=True, patches_from=0)
            engine.add(asked)
            number += 1
        if not live:
            return
        for event in engine.step():
            match event:
                case Failed(message=message):
                    raise Refused(message)
                case Delta(id=name, prompt_logprobs=[_, *_] as scored):
                    nats[name] = -sum(entry.logprob or 0.0 for entry in scored[live[name].num_known + 1 :])
                case Delta(id=name, patch_starts=starts):
                    text = live.pop(name)
                    # The last start may be where the text ends.
                    patches = sum(text.num_known < start < len(text.ids) for start in starts)
                    yield text, Score(nats.pop(name), patches)
