"""What a replica tells the ingresses of itself: how much work it has, and what work costs there."""

import time
from collections.abc import Collection
from dataclasses import dataclass, field

from engine.types import Snapshot
from server.generation import Service

NEW_SHARE = 0.2
"""Of a running mean that the newest value decides."""
REPORT_SECONDS = 0.25
"""Between two looks at the work of a replica."""


@dataclass(frozen=True)
class Rates:
    """What an engine has measured since it started: seconds of its steps for an id. A decoder's are its share of the
    steps that it took part in, so they know how full these were."""

    prompt: float = 1e-4
    output: dict[str, float] = field(default_factory=dict)
    """Per byte, by decoder."""
    bytes_per_step: dict[str, float] = field(default_factory=dict)
    """For one sequence, by decoder."""

    def steps(self, num_bytes: int, decoder: str) -> float:
        """That a sequence takes for so many bytes; with a decoder that was not used yet, as with the mean of others."""
        return num_bytes / self.bytes_per_step.get(decoder, _mean(self.bytes_per_step.values(), 1.0))

    def weight(self, decoder: str) -> float:
        """Of a sequence in a step, in those of all decoders' mean."""
        weights = {name: self.output[name] * self.bytes_per_step[name] for name in self.output}
        mean = _mean(weights.values(), 1.0)
        return weights.get(decoder, mean) / mean


@dataclass(frozen=True)
class Load:
    running: int = 0
    """Sequences with a first byte."""
    waiting: int = 0
    """Sequences without."""
    places: int = 1
    """Most sequences that run at once."""
    prompt_seconds: float = 0.0
    """Expected of the prompts that wait, if nothing of them is cached."""
    step_seconds: float = 0.01
    """Of the last steps; of the shortest if no sequence runs."""
    sequence_seconds: float = 0.0
    """What a sequence that runs beside others adds to a step; 0 while it is not known."""
    free: int = 1
    """Sequences that the queue has room for."""
    retry_after: float = 1.0
    """Seconds until it has room for one more, if it has none."""
    rates: Rates = field(default_factory=Rates)
    shortest_seconds: float = 0.0
    """Of the shortest step; 0 if it is not known."""
    is_shared: bool = False
    """Whether several API keys share the queue: if it is full, a request may still displace one of another key."""
    looks: int = 0
    """At steps without prompts: how often the shortest was sought among them."""

    @property
    def sequence_share(self) -> float:
        """What a sequence beside others adds, of what it takes alone; 0 while it is not known. Never more than all of
        it, though a measurement on a busy machine may say so."""
        alone = self.shortest_seconds or self.step_seconds
        return min(self.sequence_seconds / alone, 1.0) if alone else 0.0


class Meter:
    """Makes the reports of one replica."""

    def __init__(self, service: Service, places: int) -> None:
        self._service = service
        self._places = places
        self._made = float("-inf")
        self._snapshot = Snapshot()
        self._step_seconds = 0.0
        self._shortest = float("inf")
        self._sequence_seconds = 0.0
        self._looks = 0

    def report(self) -> Load | None:
        """None if the last one is too fresh for another."""
        if time.monotonic() < self._made + REPORT_SECONDS:
            return None
        return self.load()

    def load(self) -> Load:
        """As it is now."""
        self._made = time.monotonic()
        service, gate = self._service, self._service.gate
        snapshot = service.client.snapshot
        # The machine may have been busy with something else when that was measured.
        self._shortest = min(self._shortest, service.client.info.shortest_step or Load.step_seconds)
        rates = rates_of(snapshot)
        self._look(snapshot, rates)
        generations = service.generations.values()
        num_open = sum(not stream.finish_reason for one in generations for stream in one.streams)
        prompts = sum(one.plan.prompt_bytes for one in generations if one.first_byte is None)
        return Load(
            max(num_open - gate.waiting, 0),
            gate.waiting,
            self._places,
            prompts * rates.prompt,
            self._step_seconds if num_open and self._step_seconds else self._shortest,
            self._sequence_seconds,
            gate.capacity - gate.queued,
            gate.retry_seconds(1),
            rates,
            self._shortest,
            gate.is_shared(),
            self._looks,
        )

    def _look(self, now: Snapshot, rates: Rates) -> None:
        """Takes the time of the steps since the last snapshot."""
        then, self._snapshot = self._snapshot, now
        if now.steps < then.steps:
            # The engine has restarted.
            then = Snapshot()
        if (steps := now.steps - then.steps) > 0:
            seconds = now.step_seconds - then.step_seconds
            self._step_seconds = seconds / steps
            without_prompts = max(seconds - (now.prompt_rows - then.prompt_rows) * rates.prompt, 0.0) / steps
            if now.prompt_rows == then.prompt_rows:
                self._looks += 1
                self._shortest = min(self._shortest, self._step_seconds)
            if now.running > 1:
                each = max(without_prompts - self._shortest, 0.0) / (now.running - 1)
                self._sequence_seconds += (each - self._sequence_seconds) * (NEW_SHARE if self._sequence_seconds else 1)


def rates_of(snapshot: Snapshot) -> Rates:
    counts = {name: one for name, one in snapshot.decoders.items() if one.committed and one.rounds}
    output = {name: sum(one.seconds.values()) / one.committed for name, one in counts.items()}
    rest = sum(snapshot.stage_seconds.values()) - sum(sum(one.seconds.values()) for one in counts.values())
    prompt = max(rest, 0.0) / snapshot.prompt_rows if snapshot.prompt_rows else Rates.prompt
    return Rates(prompt, output, {name: one.committed / one.rounds for name, one in counts.items()})


def _mean(values: Collection[float], default: float) -> float:
    return sum(values) / len(values) if values else default
