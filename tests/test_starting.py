"""The next step of blt, begun before the host has read the last: the same bytes, the same bill."""

from collections import Counter
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest

from engine.config import EOS_ID
from engine.costs.latency import LatencyModel
from engine.engine import Engine
from engine.step.stages import Begun
from engine.types import Request, SamplingParams
from tests.engines import Output, bill, feeding, make_engine, request, run, save_ours, usage
from tests.models import our_config, our_model, text

SAMPLED = SamplingParams(temperature=1.0, top_p=0.9, seed=1)


@pytest.fixture(scope="module", params=["embedding", "encoder"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both forms of decoder: with bytes of its own, and behind the encoder's states."""
    made = our_model(our_config(decoder_input=request.param), 5)
    return save_ours(tmp_path_factory.mktemp("starting") / "model", made)


def starting(engine: Engine, *, begins: bool) -> Engine:
    """Lets the next step always be begun, or never; no passes behind a step."""
    engine.stepper.ahead.policy = replace(engine.stepper.ahead.policy, next_step="always" if begins else "never")
    return feeding(engine, runs_on=False)


def asked(count: int = 5, **how: Any) -> list[Request]:
    return [request(str(n), text(20 + 7 * n, n), 30 + 11 * n, **how) for n in range(count)]


def watched(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each step that was begun whether its rows were the next; grows while engines run."""
    seen: list[bool] = []
    is_of = Begun.is_of

    def tell(started: Begun, clean: Any) -> bool:
        seen.append(is_of(started, clean))
        return seen[-1]

    monkeypatch.setattr(Begun, "is_of", tell)
    return seen


def counted(engine: Engine) -> list[int]:
    """How many rows each step has that is begun; grows while the engine runs."""
    begun: list[int] = []
    start = engine.stepper.stages.begin
    engine.stepper.stages.begin = lambda batch, windows: begun.append(len(batch)) or start(batch, windows)  # type: ignore[method-assign, func-returns-value]
    return begun


@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0), SAMPLED])
@pytest.mark.parametrize("choices", [{}, {"graphs": True}, {"page_size": 4}])
def test_launching_the_next_step_ahead_keeps_bytes_and_usage(
    model: Path, sampling: SamplingParams, choices: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = run(starting(make_engine(model, **choices), begins=False), asked(sampling=sampling))
    seen = watched(monkeypatch)
    engine = starting(make_engine(model, **choices), begins=True)
    found = run(engine, asked(sampling=sampling))
    assert {name: bill(out) for name, out in found.items()} == {name: bill(out) for name, out in wanted.items()}
    assert all(seen) and len(seen) > 60
    assert engine.snapshot().steps <= 80


def test_a_step_launched_ahead_is_discarded_when_a_sequence_ends(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    law = SamplingParams(temperature=1.0, seed=2, logit_bias={EOS_ID: 4.0})
    requests = asked(sampling=law, ignore_eos=False, stop=[b"e"])
    wanted = run(starting(make_engine(model), begins=False), requests)
    seen, engine = watched(monkeypatch), starting(make_engine(model), begins=True)
    begun = counted(engine)
    found = run(engine, requests)
    assert {name: (out.ids, out.text) for name, out in found.items()} == {
        name: (out.ids, out.text) for name, out in wanted.items()
    }
    assert 0 < seen.count(True) < len(begun)


def test_no_step_is_launched_ahead_for_cells_already_encoded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft whose prompt another has left in the cache begins without a row of its own."""

    def texts(*, begins: bool) -> dict[str, list[int]]:
        engine = starting(make_engine(model, page_size=64), begins=begins)
        outputs = {name: Output() for name in ("warm", "blt", "drafts")}

        def step() -> None:
            for event in engine.step():
                outputs[event.id].take(event)

        def finish() -> None:
            while engine.has_work:
                step()

        engine.add(request("warm", text(65, 3), 4))
        finish()
        engine.add(request("blt", text(20, 1), 30))
        for _ in range(6):
            step()
        engine.add(request("drafts", text(65, 3), 20, decoder="blt-s"))
        finish()
        assert usage(outputs["drafts"]).cached_tokens == 64
        return {name: output.ids for name, output in outputs.items()}

    wanted = texts(begins=False)
    seen = watched(monkeypatch)
    assert texts(begins=True) == wanted
    assert True in seen


def overtaken(engine: Engine) -> dict[str, Output]:
    """Another request comes after every step, so that none is the one that was begun."""
    requests = [request(str(n), [1], 6) for n in range(5)]
    outputs = {r.id: Output() for r in requests}
    waiting = list(requests)
    while waiting or engine.has_work:
        if waiting:
            engine.add(waiting.pop())
        for event in engine.step():
            outputs[event.id].take(event)
    return outputs


def test_an_unused_launch_ahead_is_charged_to_no_request(model: Path) -> None:
    engine = starting(make_engine(model), begins=True)
    outputs = overtaken(engine)
    usages = [usage(output) for output in outputs.values()]
    for stage, rows in engine.ledger.total.rows.items():
        assert rows == sum(u.rows[stage] for u in usages), stage


def test_an_unused_launch_ahead_is_timed_like_any_other(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which every launch takes one second."""
    engine = starting(make_engine(model), begins=True)
    seen, clock, launched, learnt = watched(monkeypatch), iter(range(10**6)), Counter[str](), Counter[str]()
    engine.stepper.stages.launcher.clock.now = lambda: float(next(clock))  # type: ignore[method-assign]
    launch = engine.stepper.executor.run
    engine.stepper.executor.run = lambda stage, *rest: (launched.update([stage]), launch(stage, *rest))[1]  # type: ignore[method-assign]
    engine.ledger.latency.observe = lambda stage, *_: learnt.update([stage])  # type: ignore[method-assign]
    overtaken(engine)
    assert False in seen and engine.stepper.stages.begun is None
    assert launched["patcher"] > engine.ledger.total.calls["patcher"], "some served nobody"
    assert engine.ledger.total.seconds == dict(launched), "seconds of each stage"
    assert {stage: learnt[stage] for stage in launched} == dict(launched), "what costs were learnt from"


def test_no_step_is_launched_ahead_after_the_last_byte_or_without_pages(model: Path) -> None:
    engine = starting(make_engine(model), begins=True)
    begun = counted(engine)
    run(engine, [request("a", text(9, 1), 4)])
    assert begun == [1, 1, 1]
    engine.memory.reserve_all = lambda *_: False  # type: ignore[method-assign]
    run(engine, [request("b", text(9, 1), 4)])
    assert begun == [1, 1, 1]


def test_the_relative_cost_of_a_launch_ahead_follows_from_stage_costs() -> None:
    def learnt(**seconds: float) -> LatencyModel:
        costs = LatencyModel(drafts_encode=False, has_device=True)
        for stage, one in seconds.items():
            costs.observe(stage, 1, one)
        return costs

    assert LatencyModel(drafts_encode=False).next_step(1) == inf, "the host computes"
    assert learnt().next_step(1) == 0, "nothing is known"
    assert learnt(patcher=2.0, encoder=1.0).next_step(1) == 0, "it is to be tried"
    assert learnt(patcher=2.0, encoder=1.0, next_step=1.5).next_step(1) == pytest.approx(0.5)
