"""How well a model predicts texts: what the engine's own prefill gives for each byte, as it is served."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, TypeVar

from .engine import Engine
from .types import Delta, Failed, Request

IN_FLIGHT = 2
"""Texts that the engine holds at once, in running batches: while one ends the next is there."""


class Text(Protocol):
    """Some ids, of which the first `num_known` after BOS are context, not scored."""

    @property
    def ids(self) -> list[int]: ...

    @property
    def num_known(self) -> int: ...


Given = TypeVar("Given", bound=Text)


class Refused(ValueError):
    """The engine does not take a text."""


@dataclass(frozen=True, slots=True)
class Score:
    """nats: of all ids that were scored, added up. patches: how many begin with one of them."""

    nats: float
    patches: int


def score(engine: Engine, texts: Iterable[Given]) -> Iterator[tuple[Given, Score]]:
    """Scores all of them, many at a time, in the order in which they are done. A text's score does not depend on the
    others. Raises Refused for one that the engine does not take."""
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
                    # The last of them may be where the text ends.
                    patches = sum(text.num_known < start < len(text.ids) for start in starts)
                    yield text, Score(nats.pop(name), patches)
