"""Which replica gets a request: the one where it adds the least to the time that requests take.

That is its own time there, and what it takes from the others that run there: its prompt, without what the replica's
prefix cache is likely to hold, delays them all once; its sequences make each of their steps a little longer. All in
seconds, by what work has cost that replica so far: a slower machine and a slower decoder count as what they are.

Replicas tell of their load with their answers; what was sent from here since counts, too. What a replica has cached is
guessed from what was sent to it. Among equals hashes of the prompt's beginning decide (rendezvous hashing), so that
several ingresses, and one that has restarted, choose the same, and only a share of the prompts moves when a replica
comes or goes.
"""

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from .ray_load import Load
from .ray_work import SHORTEST_PREFIX, Work

MOST_PREFIXES = 20_000
"""Beginnings of prompts that are remembered, with the replicas that were sent them."""
FRESH_SECONDS = 2.0
"""How long a report holds. After that only what was sent from here counts."""
SEQUENCE_SHARE = 0.1
"""Of a step: what a sequence adds to it where that was not measured yet."""
OVERLAP = 0.3
"""Of a request's time: how long one of the others still runs beside it, on average. Outputs also end before max_tokens.
In simulation 0.15 does as well; 1 is worse."""
KNOWN_LOOKS = 8
"""At steps of a replica, after which its shortest one is believed."""
MOST_TIMES = 2.0
"""Before that it is taken for at most so many times as slow as the fastest replica: its machine may have been busy with
something else, and without work that would never be corrected."""
EQUAL = 1.2
"""Times the least that a replica would add: what others add up to that is taken for the same, as rates are measured."""


@dataclass
class _Sent:
    """A call under way."""

    when: float
    sequences: int
    prompt_seconds: float


@dataclass
class _Replica:
    """What is known of one."""

    load: Load = field(default_factory=Load)
    heard: float = float("-inf")
    sent: dict[int, _Sent] = field(default_factory=dict)

    def is_fresh(self, now: float) -> bool:
        return now - self.heard < FRESH_SECONDS

    def is_full(self, now: float) -> bool:
        return self.is_fresh(now) and self.load.free <= 0

    def added_seconds(self, work: Work, num_cached: int, other: Load, fastest: float, now: float) -> float:
        """other: of a replica that has measured what this one has not yet. fastest: the shortest step of all."""
        load, measured = self.load, self.load if self.load.rates.output else other
        rates = measured.rates
        since = [sent for sent in self.sent.values() if sent.when >= self.heard]
        others = sum(sent.sequences for sent in self.sent.values())
        ahead = sum(sent.prompt_seconds for sent in since)
        if self.is_fresh(now):
            others = max(others, load.running + load.waiting + sum(sent.sequences for sent in since))
            ahead += max(load.prompt_seconds - (now - self.heard), 0.0)
        steps = rates.steps(work.num_output, work.decoder)
        alone = measured.shortest_seconds or measured.step_seconds
        if measured.looks < KNOWN_LOOKS and fastest:
            alone = min(alone, fastest * MOST_TIMES)
        each = alone * (measured.sequence_share or other.sequence_share or SEQUENCE_SHARE)
        # An idle replica sends no report: its last one is of when it was busy.
        is_idle = not (self.is_fresh(now) and load.running) and measured.shortest_seconds > 0
        # The shortest step is that of one sequence.
        base = alone - each if is_idle else measured.step_seconds
        step = base + each * sum(sent.sequences for sent in (self.sent.values() if is_idle else since))
        added = steps * each * rates.weight(work.decoder) * work.num_sequences
        prompt = work.num_prompts * max(len(work.prompt) - num_cached, 1) * rates.prompt
        own = prompt + steps * step + added
        places = other.places if self.heard == float("-inf") else load.places
        waiting = max(others + work.num_sequences - places, 0)
        return ahead + own * (1 + waiting / places) + others * (prompt + added * OVERLAP)


class Balance:
    """What an ingress knows of the replicas. Ray's router asks it from a thread of its own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._replicas: dict[str, _Replica] = {}
        self._prefixes: OrderedDict[bytes, set[str]] = OrderedDict()
        self._under_way: set[int] = set()
        self._chose = float("-inf")
        """When all replicas were seen last: Ray names them to `choose` alone."""
        self._lock = threading.Lock()

    def begun(self, number: int) -> None:
        """A call of this number is about to be sent, and counts from when a replica is chosen until it has ended. Ray
        may still choose one for a call that its client has left."""
        with self._lock:
            self._under_way.add(number)

    def choose(
        self, number: int, work: Work, replicas: Iterable[str], avoided: frozenset[str] = frozenset()
    ) -> list[str]:
        """The replicas, from best to worst. The call of this number is expected to be sent to the first. avoided: those
        that were lost with it, or refused it."""
        with self._lock:
            self._chose = now = self._clock()
            ranked = rank(work.prompt[:SHORTEST_PREFIX], replicas)
            for gone in self._replicas.keys() - set(ranked):
                del self._replicas[gone]
            cached = self._cached(work)
            all_known = [self._replicas.setdefault(name, _Replica()) for name in ranked]
            newest = max(all_known, key=lambda r: r.heard if r.load.rates.output else -1.0, default=_Replica())
            fastest = min((r.load.shortest_seconds for r in all_known if r.load.shortest_seconds), default=0.0)
            added = {
                name: known.added_seconds(work, cached.get(name, 0), newest.load, fastest, now)
                for name, known in zip(ranked, all_known, strict=True)
            }
            equal = min(added.values(), default=0.0) * EQUAL
            best = sorted(ranked, key=lambda r: (r in avoided, self._replicas[r].is_full(now), max(added[r], equal)))
            if best:
                self._send(number, work, best[0])
            return best

    def sent(self, number: int, work: Work, replica: str) -> None:
        """The call was taken by this replica."""
        with self._lock:
            self._send(number, work, replica)
            for beginning in work.beginnings():
                key = _digest(beginning)
                # Without those that are gone: a beginning may outlive many replicas.
                self._prefixes[key] = (self._prefixes.get(key, set()) & self._replicas.keys()) | {replica}
                self._prefixes.move_to_end(key)
            while len(self._prefixes) > MOST_PREFIXES:
                self._prefixes.popitem(last=False)

    def refused(self, number: int) -> None:
        """The replica has answered the call with an error: its reports do not count the call."""
        with self._lock:
            for known in self._replicas.values():
                known.sent.pop(number, None)

    def ended(self, number: int) -> None:
        """The call has its answer. An idle replica sends no report that says so."""
        with self._lock:
            self._under_way.discard(number)
            for known in self._replicas.values():
                if (sent := known.sent.pop(number, None)) and sent.when < known.heard:
                    load = known.load
                    running, free = max(load.running - sent.sequences, 0), load.free + sent.sequences
                    known.load = replace(load, running=running, free=free)

    def heard(self, replica: str, load: Load) -> None:
        with self._lock:
            known = self._replicas.setdefault(replica, _Replica())
            known.load, known.heard = load, self._clock()

    def full(self) -> float | None:
        """The least seconds until one of the replicas has room, if none of them has. None if keys share a queue: only
        its replica can tell whose turn it is. None also if there may be new replicas: somebody has to ask for one."""
        with self._lock:
            now = self._clock()
            known = list(self._replicas.values())
            if now - self._chose >= FRESH_SECONDS:
                return None
            if not known or not all(one.is_full(now) and not one.load.is_shared for one in known):
                return None
            return min(one.load.retry_after - (now - one.heard) for one in known)

    def _send(self, number: int, work: Work, replica: str) -> None:
        if number not in self._under_way:
            return
        for known in self._replicas.values():
            known.sent.pop(number, None)
        known = self._replicas.setdefault(replica, _Replica())
        prompt = work.num_prompts * len(work.prompt) * known.load.rates.prompt
        known.sent[number] = _Sent(self._clock(), work.num_sequences, prompt)

    def _cached(self, work: Work) -> dict[str, int]:
        """How much of the prompt was sent to replicas before."""
        cached: dict[str, int] = {}
        for beginning in work.beginnings():
            if not (replicas := self._prefixes.get(_digest(beginning))):
                break
            cached |= dict.fromkeys(replicas, len(beginning))
        return cached


def rank(prefix: bytes, replicas: Iterable[str]) -> list[str]:
    """Rendezvous hashing."""
    return sorted(replicas, key=lambda replica: hashlib.blake2b(prefix, key=replica.encode()).digest())


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


BALANCE = Balance()
"""Of this process."""
