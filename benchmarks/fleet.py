"""How long requests take in a fleet of replicas, by the rule that routes them: simulated, with the real `Balance`.

A replica is its engine's steps: each has a base cost, one for every sequence (more for those that draft) and one for
every row of a prompt that its cache does not have. Clients continue dialogues and share system prompts, some far more
often than others; most guess the length of an output, and some guess far too high. A quarter of the replicas may be
half as fast. Balances hear of replicas four times a second; the other rules know every queue at every moment.
"""

import argparse
import heapq
import random
import statistics
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from deploy.ray_balance import KNOWN_LOOKS, Balance, rank
from deploy.ray_load import REPORT_SECONDS, Load, Rates
from deploy.ray_work import SHORTEST_PREFIX, Work

from . import plot, report
from .program import Content, Subject, Verdict, finish

PLACES = 32
"""Sequences that run at once."""
STEP_ROWS = 256
BLOCK = 64
"""Ids of a prompt that are cached together."""
CACHED_BLOCKS = 4000
BYTES_PER_STEP = {"blt": 1.0, "blt-s": 2.2, "blt-dv": 3.0}
WEIGHT = {"blt": 1.0, "blt-s": 1.6, "blt-dv": 1.7}
"""Of a sequence in a step."""
IMBALANCE = 4
INGRESSES = 2
MOST = 1.01
"""Of the best other rule's mean latency. The order of arrivals alone makes a per cent."""
RULES = {
    "round robin": "each replica in turn",
    "fewest": "the replica with the fewest requests",
    "prefix": f"the first by a hash of the prompt's beginning with at most {IMBALANCE} requests more than the idlest",
    "cost": "the one where it adds the least to the time that requests take",
}


@dataclass
class Asked:
    """A request. left: bytes to generate."""

    arrives: float
    prompt: bytes
    num_output: int
    decoder: str
    max_tokens: int
    left: float = 0.0
    rows: int = 0
    """Of its prompt, not computed yet."""
    num_cached: int = 0
    first_byte: float = 0.0
    ends: float = 0.0


class Costs(NamedTuple):
    """Seconds of a step, and what a sequence and a row of a prompt add to it."""

    step: float
    sequence: float
    row: float


class Engine:
    """One replica's. speed: 0.5 takes twice the costs."""

    def __init__(self, costs: Costs, speed: float) -> None:
        self.costs = Costs(*(cost / speed for cost in costs))
        self.waiting = deque[Asked]()
        self.reading = deque[Asked]()
        self.running: list[Asked] = []
        self.is_stepping = False
        self._cache = OrderedDict[int, None]()
        self._seconds = dict.fromkeys(BYTES_PER_STEP, 0.0)
        self._bytes = dict.fromkeys(BYTES_PER_STEP, 0.0)
        self._rows = 0
        self._step_seconds = self.costs.step
        self._sequence_seconds = 0.0

    @property
    def num_requests(self) -> int:
        return len(self.waiting) + len(self.reading) + len(self.running)

    def step(self, now: float) -> tuple[float, list[Asked]]:
        """Returns the time after it, and what has ended."""
        while self.waiting and len(self.running) + len(self.reading) < PLACES:
            self.reading.append(self._looked_up(self.waiting.popleft()))
        num_rows = self._read()
        weights = sum(WEIGHT[one.decoder] for one in self.running)
        seconds = self.costs.step + weights * self.costs.sequence + num_rows * self.costs.row
        self._rows += num_rows
        self._step_seconds += 0.1 * (seconds - self._step_seconds)
        if (others := len(self.running) - 1) > 0:
            each = (seconds - num_rows * self.costs.row - self.costs.step) / others
            self._sequence_seconds += 0.1 * (each - self._sequence_seconds)
        for one in self.running:
            made = min(BYTES_PER_STEP[one.decoder], one.left)
            one.left -= made
            one.first_byte = one.first_byte or now + seconds
            one.ends = now + seconds
            self._seconds[one.decoder] += seconds * WEIGHT[one.decoder] / weights
            self._bytes[one.decoder] += made
        ended = [one for one in self.running if one.left <= 0]
        self.running = [one for one in self.running if one.left > 0]
        return now + seconds, ended

    def load(self) -> Load:
        output = {name: self._seconds[name] / made for name, made in self._bytes.items() if made}
        rows = sum(one.rows for one in self.reading) + sum(len(one.prompt) for one in self.waiting)
        return Load(
            running=len(self.running),
            waiting=len(self.waiting) + len(self.reading),
            places=PLACES,
            prompt_seconds=rows * self.costs.row,
            step_seconds=self._step_seconds if self.num_requests else self.costs.step + self.costs.sequence,
            sequence_seconds=self._sequence_seconds,
            shortest_seconds=self.costs.step + self.costs.sequence,
            looks=KNOWN_LOOKS,
            rates=Rates(self.costs.row, output, {name: BYTES_PER_STEP[name] for name in output}),
        )

    def _looked_up(self, one: Asked) -> Asked:
        for end in range(BLOCK, len(one.prompt) + 1, BLOCK):
            if (key := hash(one.prompt[:end])) not in self._cache:
                break
            self._cache.move_to_end(key)
            one.num_cached = end
        one.rows = len(one.prompt) - one.num_cached
        return one

    def _read(self) -> int:
        """Rows of prompts in this step."""
        left = STEP_ROWS
        while self.reading and left:
            one = self.reading[0]
            taken = min(one.rows, left)
            one.rows, left = one.rows - taken, left - taken
            if not one.rows:
                self._keep(self.reading.popleft())
        return STEP_ROWS - left

    def _keep(self, one: Asked) -> None:
        for end in range(BLOCK, len(one.prompt) + 1, BLOCK):
            self._cache[hash(one.prompt[:end])] = None
        while len(self._cache) > CACHED_BLOCKS:
            self._cache.popitem(last=False)
        one.left = one.num_output
        self.running.append(one)


def requests(rate: float, seconds: float, seed: int) -> Iterator[Asked]:
    """At random moments, `rate` of them a second."""
    draw = random.Random(seed)
    systems = [draw.randbytes(draw.choice((256, 1000, 3000))) for _ in range(200)]
    dialogues: list[bytes] = []
    now = draw.expovariate(rate)
    while now < seconds:
        if dialogues and draw.random() < 0.6:
            prompt = dialogues.pop(draw.randrange(len(dialogues)))
        else:
            prompt = systems[min(int(draw.paretovariate(0.8)), len(systems)) - 1]
        prompt += draw.randbytes(int(draw.lognormvariate(4.5, 0.8)))
        num_output = min(max(int(draw.lognormvariate(5, 0.9)), 4), 2000)
        max_tokens = num_output if draw.random() < 0.6 else num_output * draw.choice((2, 4))
        yield Asked(now, prompt, num_output, draw.choice(("blt", "blt", "blt-s", "blt-dv")), max_tokens)
        if len(prompt) < 12_000:
            dialogues = [*dialogues[-3000:], prompt + draw.randbytes(num_output)]
        now += draw.expovariate(rate)


class Fleet:
    """Replicas and the ingresses that send them requests, on a clock of their own."""

    def __init__(self, rule: str, costs: Costs, speeds: Sequence[float]) -> None:
        self.rule = rule
        self.engines = {f"replica {number}": Engine(costs, speed) for number, speed in enumerate(speeds)}
        self.now = 0.0
        self._numbers = count()
        self._draw = random.Random(0)
        self._balances = [Balance(lambda: self.now) for _ in range(INGRESSES)]
        self._sent: dict[int, tuple[Balance, int]] = {}
        self._reported = dict.fromkeys(self.engines, 0.0)

    def run(self, asked: list[Asked]) -> None:
        """Until all have ended."""
        order = count()
        events: list[tuple[float, int, Asked | str]] = [(one.arrives, next(order), one) for one in asked]
        heapq.heapify(events)
        while events:
            self.now, _, what = heapq.heappop(events)
            if isinstance(what, Asked):
                name = self._choose(what)
                engine = self.engines[name]
                engine.waiting.append(what)
                if not engine.is_stepping:
                    engine.is_stepping = True
                    heapq.heappush(events, (self.now, next(order), name))
                continue
            engine = self.engines[what]
            after, ended = engine.step(self.now)
            self._report(what, ended)
            engine.is_stepping = engine.num_requests > 0
            if engine.is_stepping:
                heapq.heappush(events, (after, next(order), what))

    def _choose(self, one: Asked) -> str:
        names, number = list(self.engines), next(self._numbers)
        if self.rule == "round robin":
            return names[number % len(names)]
        queues = {name: engine.num_requests for name, engine in self.engines.items()}
        least = min(queues.values())
        if self.rule == "fewest":
            return self._draw.choice([name for name, queue in queues.items() if queue == least])
        if self.rule == "prefix":
            ranked = rank(one.prompt[:SHORTEST_PREFIX], names)
            return min(ranked, key=lambda name: max(queues[name] - least - IMBALANCE, 0))
        balance = self._draw.choice(self._balances)
        work = Work(one.prompt, 1, 1, one.max_tokens, one.decoder)
        balance.begun(number)
        name = balance.choose(number, work, names)[0]
        balance.sent(number, work, name)
        self._sent[id(one)] = balance, number
        return name

    def _report(self, name: str, ended: list[Asked]) -> None:
        """News comes with answers, so an idle replica sends none."""
        if self.rule != "cost":
            return
        for one in ended:
            balance, number = self._sent.pop(id(one))
            balance.ended(number)
        if self.now - self._reported[name] >= REPORT_SECONDS:
            self._reported[name] = self.now
            for balance in self._balances:
                balance.heard(name, self.engines[name].load())


@dataclass
class Figures:
    """Of one rule, one rate and one fleet. Seconds; cached: share of the prompts' ids."""

    rule: str
    slow_quarter: bool
    rate: float
    mean: float = field(init=False)
    p99: float = field(init=False)
    first_byte: float = field(init=False)
    first_byte_p99: float = field(init=False)
    cached: float = field(init=False)

    def of(self, asked: list[Asked]) -> dict[str, Any]:
        took = sorted(one.ends - one.arrives for one in asked)
        first = sorted(one.first_byte - one.arrives for one in asked)
        self.mean, self.p99 = statistics.mean(took), took[int(len(took) * 0.99)]
        self.first_byte, self.first_byte_p99 = statistics.mean(first), first[int(len(first) * 0.99)]
        self.cached = sum(one.num_cached for one in asked) / sum(len(one.prompt) for one in asked)
        return vars(self)


def simulated(
    rules: Sequence[str],
    num_replicas: int,
    rates: Sequence[float],
    seconds: float,
    costs: Costs,
    tick: Callable[[], object] = lambda: None,
) -> list[dict[str, Any]]:
    """Every rule for the same requests. rates: requests a second for each replica."""
    found = []
    for slow_quarter in (False, True):
        speeds = [0.5 if slow_quarter and number % 4 == 0 else 1.0 for number in range(num_replicas)]
        for rate in rates:
            for rule in rules:
                asked = list(requests(rate * num_replicas, seconds, seed=1))
                Fleet(rule, costs, speeds).run(asked)
                found.append(Figures(rule, slow_quarter, rate).of(asked))
                tick()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    program = argparse.ArgumentParser(prog="python -m benchmarks.fleet", description=__doc__)
    program.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the JSON file and the picture")
    program.add_argument("--replicas", type=int, default=100, help="in the fleet (%(default)s)")
    program.add_argument("--seconds", type=float, default=30.0, help="in which requests arrive (%(default)s)")
    program.add_argument(
        "--rates", type=float, nargs="+", default=[2.0, 3.0, 4.0, 5.0], help="requests a second for each replica"
    )
    program.add_argument("--step-ms", type=float, default=8.0, help="of a step without any sequence (%(default)s)")
    program.add_argument("--sequence-ms", type=float, default=0.8, help="that each adds to it (%(default)s)")
    program.add_argument("--row-ms", type=float, default=0.08, help="that a row of a prompt adds (%(default)s)")
    options = program.parse_args(arguments)
    costs = Costs(options.step_ms / 1000, options.sequence_ms / 1000, options.row_ms / 1000)
    began = time.monotonic()
    with tqdm(total=2 * len(options.rates) * len(RULES), disable=None) as bar:
        rows = simulated(list(RULES), options.replicas, options.rates, options.seconds, costs, bar.update)
    said = f"{options.replicas} simulated replicas"
    subject = Subject(f"{options.replicas}", said, Path(), "float32", "cpu", True, False, ["no engine runs"])
    content = {"rows": rows, "replicas": options.replicas, "costs": costs._asdict(), "took": time.monotonic() - began}
    finish("fleet", subject, content, options, arguments)


def render(content: Content) -> str:
    header = ["replicas", "requests a second for each", "rule", "mean, s", "p99, s"]
    header += ["first byte, mean", "first byte, p99", "cached"]
    rows = [
        [
            "a quarter half as fast" if row["slow_quarter"] else "equal",
            f"{row['rate']:g}",
            row["rule"],
            f"{row['mean']:.2f}",
            f"{row['p99']:.1f}",
            f"{row['first_byte']:.2f}",
            f"{row['first_byte_p99']:.1f}",
            f"{row['cached']:.0%}",
        ]
        for row in content["rows"]
    ]
    rules = "\n".join(f"* {name}: {said}" for name, said in RULES.items())
    return f"{report.table(header, rows)}\n\n{rules}"


def judge(content: Content) -> list[Verdict]:
    """Against each of the other rules, in each fleet and at each rate."""
    ratios = [
        row["mean"] / min(other["mean"] for other in content["rows"] if _same(other, row) and other["rule"] != "cost")
        for row in content["rows"]
        if row["rule"] == "cost"
    ]
    found = f"{min(ratios):.2f} to {max(ratios):.2f} of the best other rule's mean latency"
    return [Verdict("routing by cost", f"at most {MOST}", found, max(ratios) <= MOST)]


def draw(content: Content, path: Path) -> None:
    with plot.axes(path, "requests a second for each replica; a quarter is half as fast", "mean latency, s") as on:
        for rule in RULES:
            rows = [row for row in content["rows"] if row["rule"] == rule and row["slow_quarter"]]
            on.plot([row["rate"] for row in rows], [row["mean"] for row in rows], label=rule)
        on.set_yscale("log")


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return bool(one["rate"] == other["rate"] and one["slow_quarter"] == other["slow_quarter"])


if __name__ == "__main__":
    main()
