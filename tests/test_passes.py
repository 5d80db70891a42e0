"""Several passes in one step: what it saves, and that nothing else changes."""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from engine.config import EOS_ID
from engine.costs.latency import READBACK
from engine.costs.ledger import Launch
from engine.counts import STAGES
from engine.decoders import Result
from engine.engine import Engine
from engine.model import Decoder
from engine.rows import Rows
from engine.step import ahead
from engine.transfer import read
from engine.types import Delta, Finished, Request, SamplingParams, UnmaskRule, Usage
from tests import engines
from tests.engines import Output, request, run, save_ours
from tests.models import our_config, our_model, text

# With torch's kernels; the native ones may run a whole step by themselves.
make_engine = partial(engines.make_engine, kernels="torch")
WAYS: dict[str, dict[str, Any]] = {
    "blt-s": {"decoder": "blt-s", "draft_length": 6},
    "blt-d": {"decoder": "blt-d", "unmask": UnmaskRule(rule="confidence", alpha=0.9)},
    "blt-dv": {"decoder": "blt-dv", "unmask": UnmaskRule(rule="entropy", gamma=1.0)},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = replace(our_config(decoder_input="embedding", mask_id=260, block_size=6), isolate_documents=True)
    return save_ours(tmp_path_factory.mktemp("passes") / "model", our_model(config, 5))


def device_engine(model: Path, **choices: Any) -> Engine:
    """Runs ahead as on a device that is not the host: measured times decide when blocks are read back."""
    engine = make_engine(model, run_ahead="always", **choices)
    ahead, blocks = engine.stepper.ahead, engine.stepper.ahead._blocks

    def as_measured(batch: Sequence[Rows]) -> list[Result] | None:
        ahead.policy = "measured"
        try:
            return blocks(batch)
        finally:
            ahead.policy = "always"

    ahead._blocks = as_measured  # type: ignore[method-assign]
    return engine


def usage(output: Output) -> Usage:
    assert isinstance(output.end, Finished)
    return output.end.usage


def counted(u: Usage) -> tuple[Any, ...]:
    return u.rounds, u.decoder_calls, u.global_calls, u.drafted, u.accepted, u.rows


def run_beside(engine: Engine, asked: Request, other: Request) -> Output:
    """What it says of one request beside another, whose bytes outlast its rounds."""
    outputs = {r.id: Output() for r in (asked, other)}
    for r in (asked, other):
        engine.add(r)
    while not outputs[asked.id].end:
        assert not outputs[other.id].end
        for event in engine.step():
            outputs[event.id].take(event)
    return outputs[asked.id]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"sampling": SamplingParams(temperature=1.0, top_p=0.9, seed=1)},
        {"sampling": SamplingParams(temperature=1.0, seed=2, logit_bias={EOS_ID: 3.0, 100: -2.0})},
    ],
)
def test_text_and_usage_of_a_draft_are_the_same_alone_and_beside_a_blt_sequence(
    model: Path, way: str, how: dict[str, Any]
) -> None:
    asked = request("it", text(30, 2), 40, **WAYS[way], **how)
    alone = device_engine(model)
    found = run(alone, [asked])["it"]
    beside = run_beside(device_engine(model), asked, request("other", text(20, 3), 300))
    assert beside.ids == found.ids
    if EOS_ID not in found.ids:  # A draft alone goes on after an EOS, in vain; one beside others stops there.
        assert counted(usage(beside)) == counted(usage(found))
    passes = alone.ledger.total.calls["decoder"]
    assert alone.snapshot().steps < passes, "passes were run together"


def test_a_whole_draft_takes_one_step(model: Path) -> None:
    engine = device_engine(model)
    u = usage(run(engine, [request("a", text(30, 2), 60, **WAYS["blt-s"])])["a"])
    assert u.decoder_calls > 3 * u.rounds
    # The prompt's, then a draft's and a verification's in turn; the last bytes need no draft.
    assert engine.snapshot().steps <= 2 * u.rounds + 1


def stages_of_steps(engine: Engine, asked: list[Request]) -> list[tuple[str, ...]]:
    """What each step launched."""
    names: list[str] = []
    launch = engine.stepper.executor.run
    engine.stepper.executor.run = lambda name, *rest: (names.append(name), launch(name, *rest))[1]  # type: ignore[method-assign]
    for r in asked:
        engine.add(r)
    steps = []
    while engine.has_work:
        engine.step()
        steps.append(tuple(names))
        names.clear()
    return steps


def test_the_verification_is_launched_after_its_draft_without_waiting_for_the_host(model: Path) -> None:
    asked = [request(str(n), text(30, n), 60, **WAYS["blt-s"]) for n in range(3)]
    steps = stages_of_steps(device_engine(model), asked)
    drafting = [n for n, names in enumerate(steps) if "draft" in names]
    assert len(drafting) > 5
    for n in drafting:
        assert steps[n] in (("draft", "patcher", "encoder"), ("draft",))
        assert ("patcher" in steps[n + 1]) == ("patcher" not in steps[n])
    assert sum("patcher" in steps[n] for n in drafting) > len(drafting) / 2


def test_a_verification_launched_with_wrong_drafts_is_launched_again(model: Path) -> None:
    """A draft that ends with an EOS is shorter than what was launched; one may leave meanwhile, one may come."""
    sampling = SamplingParams(temperature=1.0, seed=2, logit_bias={EOS_ID: 3.0})
    asked = [request(str(n), text(30, n), 40, sampling=sampling, **WAYS["blt-s"]) for n in range(3)]
    steps = stages_of_steps(device_engine(model), asked)
    assert any("draft" in a and "patcher" in a and "patcher" in b for a, b in pairwise(steps))
    engine = device_engine(model)
    for r in asked:
        engine.add(r)
    alone = run(device_engine(model), [asked[1]])["1"].ids
    found: list[int] = []
    joined = False
    while engine.has_work:
        for event in engine.step():
            found += event.ids if isinstance(event, Delta) and event.id == "1" else []
        if len(found) > 10 and not joined:
            joined = True
            engine.abort("0")
            engine.add(request("3", text(50, 3), 20))
    assert found == alone


@pytest.mark.parametrize(
    ("way", "how"), [*((way, {"min_tokens": 30}) for way in WAYS), ("blt-d", {"logprobs": 2})], ids=str
)
def test_before_min_tokens_and_for_scores_of_blocks_stages_run_pass_by_pass(
    model: Path, way: str, how: dict[str, Any]
) -> None:
    engine = device_engine(model)
    found = run(engine, [request("it", text(30, 2), 30, **WAYS[way], **how)])["it"]
    assert engine.snapshot().steps >= engine.ledger.total.calls["decoder"]
    assert len(found.ids) == 30
    assert len(found.logprobs) == (30 if "logprobs" in how else 0)


@pytest.mark.parametrize("frequency", [0.0, 1.5])
def test_drafts_of_different_lengths_in_one_step_are_the_same_as_alone(model: Path, frequency: float) -> None:
    how: dict[str, Any] = {"decoder": "blt-s", "sampling": SamplingParams(temperature=0, frequency_penalty=frequency)}
    asked = [
        request("a", text(30, 2), 40, draft_length=3, **how),
        request("b", text(25, 4), 40, draft_length=8, **how),
    ]
    alone = {r.id: run(device_engine(model), [r])[r.id] for r in asked}
    for name, out in run(device_engine(model), asked).items():
        assert out.ids == alone[name].ids
        assert usage(out).accepted == usage(alone[name]).accepted > 0


def test_the_host_reads_back_a_block_only_when_it_may_be_complete(model: Path) -> None:
    """Once blocks have needed several passes, so many are one launch; the text and the counts stay what they were."""
    asked = request("a", text(30, 2), 90, decoder="blt-d", unmask=UnmaskRule(rule="confidence", alpha=0.999))
    engine = device_engine(model)
    launches: list[tuple[str, int]] = []
    launch = engine.stepper.stages.decoder.launch_passes

    def noted(name: str, plans: Any, times: int, *rest: Any) -> Any:
        launches.append((name, len(plans) * times))
        return launch(name, plans, times, *rest)

    engine.stepper.stages.decoder.launch_passes = noted  # type: ignore[method-assign]
    first = run(engine, [asked])["a"]
    early, launches = launches, []
    again = run(engine, [asked])["a"]
    assert again.ids == first.ids and counted(usage(again))[:5] == counted(usage(first))[:5]
    assert {times for _, times in early} > {1}, "asked after each pass, until one knows better"
    assert max(times for _, times in early) > 2
    assert len(launches) < len(early)


def test_with_policy_always_every_block_is_one_launch(model: Path) -> None:
    asked = request("a", text(30, 2), 90, decoder="blt-d", unmask=UnmaskRule(rule="confidence", alpha=0.6))
    wanted = run(device_engine(model), [asked])["a"]
    engine = make_engine(model, run_ahead="always")
    run(engine, [asked])
    steps = engine.snapshot().steps
    found = run(engine, [asked])["a"]
    assert found.ids == wanted.ids and counted(usage(found))[:5] == counted(usage(wanted))[:5]
    assert usage(found).decoder_calls > 2 * usage(found).rounds
    assert engine.snapshot().steps - steps == usage(found).rounds


def test_a_block_pays_only_for_the_passes_that_it_needs(model: Path) -> None:
    engine = device_engine(model)
    slow = request("slow", text(30, 2), 60, decoder="blt-d", unmask=UnmaskRule(rule="confidence", alpha=0.999))
    quick = request("quick", text(30, 2), 60, decoder="blt-d", unmask=UnmaskRule(rule="one_step"))
    alone = run(device_engine(model), [quick])["quick"]
    run(engine, [slow])
    calls = engine.ledger.total.calls["decoder"]
    found = run(engine, [quick])["quick"]
    assert found.ids == alone.ids and usage(found).decoder_calls == usage(alone).decoder_calls
    # The prompt's pass is charged to no request.
    assert engine.ledger.total.calls["decoder"] - calls <= usage(found).decoder_calls + 1


@pytest.mark.parametrize("way", WAYS)
def test_the_latency_model_ignores_launches_that_record_graphs(model: Path, way: str) -> None:
    engine = device_engine(model, graphs=True)
    seen: list[str] = []
    engine.ledger.latency.observe = lambda stage, *_: seen.append(stage)  # type: ignore[method-assign]
    launched: list[tuple[str, bool]] = []
    executor = engine.stepper.executor
    launch = executor.run

    def run(name: str, *rest: Any) -> Any:
        before = executor.num_recorded
        out = launch(name, *rest)
        launched.append((name, executor.num_recorded > before))
        return out

    executor.run = run  # type: ignore[method-assign]
    engine.add(request("a", text(30, 2), 60, **WAYS[way]))
    steps = []
    while engine.has_work:
        number = len(launched)
        engine.step()
        steps.append(any(new for _, new in launched[number:]))
    # What was launched ahead of a step that never came.
    engine.stepper.stages.discard()
    assert set(steps) == {False, True}
    assert seen.count("step") == steps.count(False)
    assert sum(map(seen.count, STAGES)) == sum(not new for _, new in launched)
    readbacks = seen.count(READBACK)
    assert readbacks <= sum(name.startswith("unmask") and not new for name, new in launched)
    assert readbacks or way != "blt-d"


def test_the_time_of_a_readback_includes_waiting_for_the_blocks(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that one launch more would cost the host counts against it."""
    delay = 0.01
    monkeypatch.setattr(ahead, "read", lambda *given: (time.sleep(delay), read(*given))[1])
    engine = device_engine(model)
    readbacks: list[float] = []
    engine.ledger.latency.observe = lambda stage, rows, seconds: readbacks.extend([seconds] * (stage == READBACK))  # type: ignore[method-assign]
    run(engine, [request("a", text(30, 2), 12, decoder="blt-d", unmask=UnmaskRule(rule="confidence", alpha=0.999))])
    assert readbacks and min(readbacks) >= delay


def test_needless_passes_over_blocks_are_charged_to_no_request_but_timed(model: Path) -> None:
    """Prompts of one id: every row belongs to a request."""
    slow, quick = (
        request(name, [1], count, decoder="blt-d", unmask=UnmaskRule(rule="confidence", alpha=alpha))
        for name, count, alpha in (("slow", 24, 0.999), ("quick", 60, 0.03))
    )
    engine = make_engine(model, run_ahead="always")
    run(engine, [slow])
    launched: list[tuple[int, int]] = []
    took = engine.ledger.took

    def noted(launch: Launch, *served: Any) -> None:
        if not launch.shares:
            launched.append((len(served), launch.passes))
        took(launch, *served)

    engine.ledger.took = noted  # type: ignore[method-assign]
    before = dict(engine.ledger.total.rows)
    usages = [usage(output) for output in run(engine, [slow, quick]).values()]
    for stage, rows in engine.ledger.total.rows.items():
        assert rows - before[stage] == sum(u.rows[stage] for u in usages), stage
    assert any(served < passes for served, passes in launched), "some passes were in vain"
    assert engine.ledger.total.calls["decoder"] < sum(passes for _, passes in launched) + engine.snapshot().steps


@pytest.fixture
def decoder_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every pass of the decoder that runs, needed or not; grows while engines run."""
    seen: list[int] = []
    forward = Decoder.__call__

    def noted(decoder: Decoder, x: Any, *rest: Any) -> Any:
        seen.append(len(x))
        return forward(decoder, x, *rest)

    monkeypatch.setattr(Decoder, "__call__", noted)
    return seen


@pytest.mark.parametrize("scores", [{}, {"logprobs": 0}], ids=["", "scored"])
def test_the_decoder_runs_no_pass_over_a_complete_block(
    model: Path, decoder_passes: list[int], scores: dict[str, Any]
) -> None:
    """Even where asking takes longest, and whatever the blocks before needed."""
    engine = device_engine(model)
    engine.ledger.latency.readback = lambda rows: 1e9  # type: ignore[method-assign]

    def passes(way: str, unmask: UnmaskRule) -> tuple[int, Usage]:
        decoder_passes.clear()
        u = usage(run(engine, [request("a", [1], 60, decoder=way, unmask=unmask, **scores)])["a"])
        return len(decoder_passes), u

    # No confidence is above 1: a cell a pass, of the 6 in a block.
    ran, u = passes("blt-d", UnmaskRule(rule="confidence", alpha=1.0))
    assert ran == u.decoder_calls == 6 * u.rounds
    ran, u = passes("blt-d", UnmaskRule(rule="one_step"))
    assert ran == u.decoder_calls == u.rounds
    # A pass over the block and one that verifies it.
    ran, u = passes("blt-dv", UnmaskRule(rule="one_step"))
    assert ran == u.decoder_calls <= 2 * u.rounds


def test_passes_launched_ahead_do_not_exceed_those_of_the_slowest_recent_block(
    model: Path, decoder_passes: list[int]
) -> None:
    """A block each, by the rule of which one needs more passes than another; all of them are remembered."""
    engine = device_engine(model)
    engine.ledger.latency.readback = lambda rows: 1e9  # type: ignore[method-assign]
    asked = [
        request(str(n), text(10 + n, n), 6, decoder="blt-d", unmask=UnmaskRule(rule="confidence", alpha=0.03))
        for n in range(12)
    ]
    needed = [usage(run(engine, [r])[r.id]).decoder_calls for r in asked]
    assert len(set(needed)) > 1 and max(needed) < 6, "of 6 that a block can need"
    for r, own in zip(asked, needed, strict=True):
        decoder_passes.clear()
        assert usage(run(engine, [r])[r.id]).decoder_calls == own
        assert len(decoder_passes) == max(needed)
