"""Engines in the test's own process, and what they say about texts."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint import save
from engine.config import EngineConfig, ModelConfig
from engine.engine import Engine
from engine.rows import Rows
from engine.sequence import Sequence as EngineSequence
from engine.types import Delta, Event, Failed, Finished, Request, SamplingParams, TokenLogprob, Usage

GREEDY = SamplingParams(temperature=0)


@dataclass
class Output:
    """All that an engine said of one request."""

    ids: list[int] = field(default_factory=list)
    text: bytes = b""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    rounds: list[Any] = field(default_factory=list)
    """Of traces: ids, drafts, accepted, passes."""
    patch_starts: list[int] = field(default_factory=list)
    """As traces tell them."""
    entropies: list[float] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    """Of prompt and output."""
    end: Finished | Failed | None = None

    def take(self, event: Event) -> None:
        """Nothing may come behind the last."""
        assert self.end is None
        if isinstance(event, Delta):
            self.ids += event.ids
            self.text += event.text
            self.logprobs += event.logprobs
            self.prompt_logprobs += event.prompt_logprobs
            self.rounds += [(trace.num_ids, trace.drafts, trace.accepted, trace.passes) for trace in event.traces]
            self.patch_starts += [start for trace in event.traces for start in trace.patch_starts]
            self.entropies += event.entropies
            self.starts += event.patch_starts
        else:
            self.end = event
            self.text += event.text if isinstance(event, Finished) else b""


def usage(output: Output) -> Usage:
    assert isinstance(output.end, Finished)
    return output.end.usage


def bill(output: Output) -> tuple[Any, ...]:
    """What one request wrote and took, whoever ran beside it and however far ahead the host launched."""
    u = usage(output)
    return output.text, u.completion_tokens, u.rounds, u.decoder_calls, u.global_calls, u.rows, u.estimated_bytes


def make_engine(model: Path, **choices: Any) -> Engine:
    return Engine(EngineConfig(model=str(model), **({"cache_bytes": 64 << 20, "page_size": 16} | choices)))


def crowded_engine(model: Path, **choices: Any) -> Engine:
    """With as little cache as can hold one sequence of the length asked for."""
    for shift in range(14, 40):
        try:
            return make_engine(model, cache_bytes=1 << shift, **choices)
        except ValueError as error:
            assert "cache_bytes" in str(error)
    raise AssertionError


@contextmanager
def threads(count: int) -> Iterator[None]:
    """That many for torch's work in this process, whatever the machine and the number of workers give it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def save_ours(folder: Path, made: tuple[ModelConfig, dict[str, Tensor]]) -> Path:
    save(folder, *made)
    return folder


def request(name: str, prompt: Sequence[int], count: int, **fields: Any) -> Request:
    fields = {"sampling": GREEDY, "ignore_eos": True} | fields
    return Request(id=name, prompt_ids=list(prompt), max_tokens=count, **fields)


def run(engine: Engine, requests: Iterable[Request]) -> dict[str, Output]:
    """Runs all of them together until the engine is idle; holds it to one last event each and no page left."""
    outputs = {r.id: Output() for r in requests}
    for r in requests:
        engine.add(r)
    while engine.has_work:
        for event in engine.step():
            outputs[event.id].take(event)
    assert all(output.end for output in outputs.values())
    assert not any(pool.used for pool in engine.snapshot().pools.values())
    return outputs


def engine_logits(engine: Engine, ids: Sequence[int], chunk: int) -> Tensor:
    """Logits of the id after each id: (N, vocab_size), computed `chunk` rows at a time over the engine's caches."""
    sequence = EngineSequence(request("logits", ids, 1), 0, engine.memory.caches.new_tables())
    engine.memory.slots.take(sequence)
    parts = []
    for start in range(0, len(ids), chunk):
        end = min(start + chunk, len(ids))
        rows = Rows(sequence=sequence, start=start, end=end, logits_from=start, decode_from=start)
        assert engine.memory.reserve(rows)
        with torch.inference_mode():
            parts.append(engine.stepper.stages.run([rows]))
        sequence.advance(end)
        engine.memory.trim(sequence)
    engine.memory.release(sequence)
    return torch.cat(parts)
