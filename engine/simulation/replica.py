"""A replica on a clock of its own: the real engine with its scheduler, pages and prefix cache. Only the stages are
replaced, by what they cost; the text is made up."""

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch

from kernels.dispatch import choose_kernels

from ..build import Parts
from ..config import BOS_ID, BYTE_OFFSET, EngineConfig, ModelConfig, ModelLimits
from ..costs.accounting import PaperFormula, StageBytes
from ..costs.clock import HostClock
from ..costs.latency import LatencyModel
from ..costs.ledger import Ledger
from ..decoders import DECODERS, Committed, Decoder, Next, Result, Round, SequenceView
from ..engine import Engine
from ..memory.caches import Caches
from ..memory.memory import Memory
from ..memory.prefix import PrefixCache
from ..memory.text import Slots
from ..rows import Rows
from ..step.graphs import Eager
from ..step.step import Stepper
from ..types import MAX_DRAFT, Delta, Failed, Finished, Request
from .costs import ReplicaCosts
from .load import Arrival


class RequestLatency(NamedTuple):
    """Seconds from a request's arrival to its first byte, and to its last. running: sequences in the batch when its
    first byte came."""

    first_byte: float
    last_byte: float
    running: int


class MeasuredDecoder(Decoder):
    """Takes what a step gives, as if it were one round of the measured decoder."""

    def round(self, sequence: SequenceView, room: int) -> Round:
        result = yield Next()
        return Committed(result.ids, result.scores)


class CostedStepper(Stepper):
    """Gives bytes of no meaning. seconds: what the last step would have taken."""

    def __init__(self, costs: ReplicaCosts, patch: float) -> None:
        """patch: mean bytes."""
        self.seconds = 0.0
        self._costs, self._patch = costs, patch
        self._owed = 0.0
        self._eager = Eager(torch.device("cpu"), 1)
        # Of the stages the engine asks only this.
        self.stages = cast(Any, self)

    @property
    def executor(self) -> Eager:
        return self._eager

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def discard(self) -> None:
        """No step is begun ahead."""

    discard_if_lost = discard

    def run(self, batch: Seq[Rows]) -> Seq[Result | None]:
        asking = [rows.sequence for rows in batch if rows.ask]
        self.seconds, each = 0.0, 1.0
        if asking:
            cost = self._costs.round(len(asking))
            each = cost.num_bytes if len(asking) == len(batch) else _beside_prompts(self._costs.decoder, cost.num_bytes)
            each = min(each, max(one.tokens_left for one in asking), MAX_DRAFT)
            self.seconds = cost.seconds * each / cost.num_bytes
        for rows in batch:
            if rows.start < rows.sequence.num_prompt:
                self.seconds += self._costs.rows_seconds(rows.start, min(rows.end, rows.sequence.num_prompt))
        return [self._result(rows, each) for rows in batch]

    def _result(self, rows: Rows, each: float) -> Result | None:
        sequence, decided = rows.sequence, rows.sequence.patching.decided
        if decided < rows.end:
            opens = [int((row + 1) / self._patch) > int(row / self._patch) for row in range(decided, rows.end)]
            sequence.decide([1.0] * len(opens), opens)
        if not rows.ask:
            return None
        self._owed += each
        count = max(int(self._owed), 1)
        self._owed -= count
        return Result([BYTE_OFFSET] * min(count, sequence.tokens_left))


def _beside_prompts(decoder: str, num_bytes: float) -> float:
    """Bytes of each sequence in a step that reads a prompt, too. num_bytes: in other steps.

    As in `engine.step.one_call`: the prompt would wait for more bytes of blt than one. Drafts are not verified in the
    step that makes them, but in the next, so that two steps make a round. A block that is not verified takes one step.
    """
    if decoder == "blt":
        return 1.0
    spec = DECODERS.get(decoder)
    return max(num_bytes / 2, 1.0) if spec is None or spec.exact else num_bytes


def simulated_engine(config: ModelConfig, costs: ReplicaCosts, patch: float) -> tuple[Engine, CostedStepper]:
    """Raises ValueError if the caches cannot hold a sequence."""
    chosen = EngineConfig(
        model="",
        dtype=costs.dtype,
        cache_bytes=costs.cache_bytes,
        page_size=costs.page_size,
        max_sequences=costs.max_sequences,
        max_step_rows=costs.max_step_rows,
    )
    # Pages are counted, and hold nothing.
    caches = Caches(config, replace(chosen, device=cast(Any, "meta")))
    stage_bytes = StageBytes.of(config, 4, 4)
    ledger = Ledger(stage_bytes, LatencyModel(drafts_encode=False), HostClock())
    stepper = CostedStepper(costs, patch)
    limits = ModelLimits(
        name=config.name, max_length=caches.max_length, vocab_size=config.vocab_size, block_size=None,
        decoders=("blt",), parameters=0, pages={name: pool.num_total for name, pool in caches.pools.items()},
        patching=config.patching,
    )  # fmt: skip
    parts = Parts(
        config=config,
        model=None,
        limits=limits,
        kernels=choose_kernels("torch", torch.device("cpu")),
        memory=Memory(caches, PrefixCache(caches), Slots(chosen.max_sequences, 1, torch.device("cpu"))),
        ledger=ledger,
        stepper=stepper,
        stage_bytes=stage_bytes,
        formula=PaperFormula.of(config, 4),
    )
    engine = Engine(chosen, parts)
    engine.prompt_rows = costs.prompt_rows
    engine.reset()
    return engine, stepper


def serve(config: ModelConfig, costs: ReplicaCosts, patch: float, arriving: Seq[Arrival]) -> list[RequestLatency]:
    """All requests, in their order, by one replica. Raises ValueError for lengths that it cannot hold."""
    engine, stepper = simulated_engine(config, costs, patch)
    coming = deque(enumerate(arriving))
    now, first, served = 0.0, dict[str, tuple[float, int]](), dict[int, RequestLatency]()
    while coming or engine.has_work:
        if not engine.has_work:
            now = max(now, coming[0][1].at + costs.request_seconds)
        while coming and coming[0][1].at + costs.request_seconds <= now:
            number, arrival = coming.popleft()
            engine.add(_request(number, arrival), MeasuredDecoder())
        events = engine.step()
        now += stepper.seconds
        for event in events:
            match event:
                case Delta(id=id) if id not in first:
                    first[id] = now - arriving[int(id)].at, len(engine.running)
                case Finished(id=id):
                    served[int(id)] = RequestLatency(first[id][0], now - arriving[int(id)].at, first[id][1])
                case Failed(message=message):
                    raise ValueError(f"a request cannot be served: {message}")
    return [served[number] for number in range(len(arriving))]


def saturation_rate(config: ModelConfig, costs: ReplicaCosts, patch: float, asked: Seq[Arrival]) -> float:
    """Requests a second that a replica serves for as long as you like: these requests, of which one is always waiting,
    whenever they would arrive. A higher rate makes the queue grow without end.

    Raises ValueError for lengths that it cannot hold, and for too few requests.
    """
    engine, stepper = simulated_engine(config, costs, patch)
    places = costs.max_sequences
    if len(asked) < (least := 3 * (places + 1)):
        raise ValueError(f"{len(asked)} requests do not tell what {places} places serve: {least} are needed")
    coming, now, ends = deque(enumerate(asked)), 0.0, list[float]()
    while coming:
        # No more: of a long queue the engine prefers short prompts, and would leave the long ones for the end.
        while coming and len(asked) - len(coming) - len(ends) <= places:
            engine.add(_request(*coming.popleft()), MeasuredDecoder())
        events = engine.step()
        now += stepper.seconds
        for event in events:
            match event:
                case Finished():
                    ends.append(now)
                case Failed(message=message):
                    raise ValueError(f"a request cannot be served: {message}")
    # By then the first ones, which all began together, have made room for others.
    return (len(ends) - places) / (ends[-1] - ends[places - 1])


def _request(number: int, arrival: Arrival) -> Request:
    """Its prompt begins like no other."""
    begin = [BOS_ID, *(BYTE_OFFSET + byte for byte in number.to_bytes(4, "big"))]
    prompt = begin[: arrival.prompt_bytes] + [BYTE_OFFSET] * (arrival.prompt_bytes - len(begin))
    return Request(id=str(number), prompt_ids=prompt, max_tokens=arrival.output_bytes, ignore_eos=True)
