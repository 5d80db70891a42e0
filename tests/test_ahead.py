"""Running ahead of the host: fewer steps, the same bytes, the same bill, whatever kind of work.

What serves no request is timed and charged to none. `tests/test_running_on.py` varies requests, settings and moments.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint import load
from engine.config import EOS_ID, Policy
from engine.costs.latency import LAUNCH_SECONDS, MOST_LAUNCHED, LatencyModel
from engine.counts import STAGES
from engine.rows import Rows
from engine.step.stages import FirstHalf, Stages
from engine.types import Failed, Request, SamplingParams, UnmaskRule
from tests import engines
from tests.engines import Output, bill, request, run, save_ours, usage
from tests.models import our_config, our_model, text

# With torch's kernels; the native ones may run a whole step by themselves.
make_engine = partial(engines.make_engine, kernels="torch")
crowded_engine = partial(engines.crowded_engine, kernels="torch")
HOW: list[dict[str, Any]] = [
    {},
    {"sampling": SamplingParams(temperature=1.0, top_p=0.9, seed=1)},
    {"sampling": SamplingParams(temperature=1.0, seed=2, logit_bias={EOS_ID: 3.0, 100: -2.0})},
    {"ignore_eos": False, "sampling": SamplingParams(temperature=0.8, seed=3, logit_bias={EOS_ID: 2.0})},
    {"stop": [b"e", b"th"], "sampling": SamplingParams(temperature=0.8, seed=4)},
    {"sampling": SamplingParams(temperature=0.7, seed=4, presence_penalty=0.5, frequency_penalty=-0.3)},
    {"sampling": SamplingParams(temperature=0, frequency_penalty=0.3, repetition_penalty=1.3, logit_bias={100: 2.0})},
]
WAYS: dict[str, dict[str, Any]] = {
    "bytes": {},
    "drafts": {"decoder": "blt-s", "draft_length": 6},
    "blocks": {"decoder": "blt-d", "unmask": UnmaskRule(rule="confidence", alpha=0.6)},
}


@pytest.fixture(scope="module", params=["embedding", "encoder"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both forms of decoder: with bytes of its own, and after the encoder's states. Documents are isolated."""
    config, tensors = our_model(replace(our_config(decoder_input=request.param), isolate_documents=True), 5)
    rule = replace(config.patching, max_patch_length=5)
    return save_ours(tmp_path_factory.mktemp("ahead") / "model", (replace(config, patching=rule), tensors))


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = our_model(our_config(decoder_input="embedding", mask_id=260, block_size=6), 5)
    return save_ours(tmp_path_factory.mktemp("ahead") / "blocks", made)


def asked(count: int = 5, **how: Any) -> list[Request]:
    return [request(str(n), text(20 + 7 * (n % 5), n), 30 + 11 * (n % 5), **how) for n in range(count)]


def bills(outputs: dict[str, Output]) -> dict[str, tuple[Any, ...]]:
    return {name: bill(out) for name, out in outputs.items()}


def begun_steps(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[bool]]:
    """The sequences of each step that is begun; and of each that a step was compared with, whether it was this one.
    Both grow while engines run."""
    begun: list[int] = []
    used: list[bool] = []
    begin, is_of = Stages.begin, FirstHalf.is_of
    monkeypatch.setattr(Stages, "begin", lambda stages, batch: (begun.append(len(batch)), begin(stages, batch))[1])
    monkeypatch.setattr(FirstHalf, "is_of", lambda half, batch: (used.append(is_of(half, batch)), used[-1])[1])
    return begun, used


@pytest.fixture(scope="module")
def single_steps(model: Path) -> Callable[[int], tuple[dict[str, Output], int]]:
    """What is written as the n-th of `HOW` asks, a byte a step, and in how many steps."""

    @cache
    def written(number: int) -> tuple[dict[str, Output], int]:
        engine = make_engine(model, run_ahead="never")
        return run(engine, asked(**HOW[number])), engine.snapshot().steps

    return written


@pytest.mark.parametrize("number", range(len(HOW)), ids="how{}".format)
@pytest.mark.parametrize("choices", [{}, {"graphs": True, "page_size": 4}], ids=str)
def test_bytes_launched_together_are_those_of_single_steps(
    model: Path, number: int, choices: dict[str, Any], single_steps: Callable[[int], tuple[dict[str, Output], int]]
) -> None:
    how, engine = HOW[number], make_engine(model, run_ahead="always", **choices)
    (wanted, steps), found = single_steps(number), run(engine, asked(**how))
    assert {name: out.ids for name, out in found.items()} == {name: out.ids for name, out in wanted.items()}
    if "stop" not in how:  # Passes after a stop string did run.
        assert bills(found) == bills(wanted)
    assert [usage(out).rounds for out in found.values()] == [usage(out).rounds for out in wanted.values()]
    assert engine.snapshot().steps < steps


@pytest.mark.parametrize("decoder", ["blt", "blt-s"])
def test_patches_beyond_the_end_of_a_text_are_neither_told_nor_counted(model: Path, decoder: str) -> None:
    """A stop string ends it among bytes that were launched together, or within accepted drafts."""
    counted = []
    for policy in ("always", "never"):
        engine = make_engine(model, run_ahead=policy)
        found = run(engine, asked(stop=[b"e", b"th"], trace=True, decoder=decoder, sampling=HOW[4]["sampling"]))
        for out in found.values():
            starts = out.patch_starts
            assert starts == sorted(set(starts)) and all(start < len(out.ids) for start in starts)
            assert decoder != "blt" or usage(out).rounds == len(out.ids)
        counted.append((engine.ledger.patch_sizes, engine.ledger.patch_bytes))
    assert counted[0] == counted[1] and sum(counted[0][0])


def test_a_step_runs_as_many_bytes_as_all_sequences_have_left(model: Path) -> None:
    engine = make_engine(model, run_ahead="always")
    run(engine, [request(name, [1, 5], count) for name, count in (("a", 2 * MOST_LAUNCHED), ("b", MOST_LAUNCHED + 3))])
    assert engine.snapshot().steps == 3, "as many of both, the 3 that one has left, the rest of the other"


@pytest.mark.parametrize("number", [0, 5, 6])
@pytest.mark.parametrize("kind", WAYS)
def test_text_and_usage_do_not_depend_on_the_policy(blocks: Path, kind: str, number: int) -> None:
    steps, found = {}, []
    how = HOW[number] | WAYS[kind]
    for policy in ("measured", "always", "never"):
        engine = make_engine(blocks, run_ahead=policy, prefix_cache=False)
        assert engine.stepper.ahead.policy == policy
        # The first teaches the engine how many passes blocks take.
        found += [bills(run(engine, [request("a", text(30, 2), 60, **how)])) for _ in "ab"]
        steps[policy] = engine.snapshot().steps
    assert all(other == found[0] for other in found)
    assert steps["always"] < steps["never"] == steps["measured"], "a CPU gains nothing"


def test_work_that_serves_no_request_is_timed_and_charged_to_none(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which every launch takes one second. Prompts of one id: every row belongs to a request."""
    engine, clock, launched, learnt = make_engine(model, run_ahead="always"), iter(range(10**6)), Counter(), Counter()
    engine.stepper.stages.launcher.clock.now = lambda: float(next(clock))  # type: ignore[method-assign]
    launch, saw = engine.stepper.executor.run, engine.ledger.latency.observe

    def counted(name: str, *rest: Any) -> Any:
        launched[name.split()[0]] += 1
        return launch(name, *rest)

    def noted(stage: str, *rest: Any) -> None:
        learnt[stage] += 1
        saw(stage, *rest)

    engine.stepper.executor.run = counted  # type: ignore[method-assign]
    engine.ledger.latency.observe = noted  # type: ignore[method-assign]
    law = SamplingParams(temperature=1.0, seed=2, logit_bias={EOS_ID: 3.0})
    _, used = begun_steps(monkeypatch)
    outputs = {str(n): Output() for n in range(6)}
    waiting = [request(name, [1], 40, sampling=law, ignore_eos=n % 2 == 0) for n, name in enumerate(outputs)]
    while waiting or engine.has_work:
        if waiting:
            engine.add(waiting.pop())
        for event in engine.step():
            outputs[event.id].take(event)
    engine.stepper.stages.discard()
    total = engine.ledger.total
    for stage, rows in total.rows.items():
        assert rows == sum(usage(output).rows[stage] for output in outputs.values()), stage
    assert False in used and launched["patcher"] > total.calls["patcher"], "some served no request"
    assert total.seconds == dict(launched), "seconds of each stage"
    unlearnt = launched["global"] - learnt["global"]
    assert {stage: learnt[stage] for stage in ("patcher", "encoder", "decoder")} == {
        stage: launched[stage] for stage in ("patcher", "encoder", "decoder")
    }
    assert 0 < unlearnt < launched["global"], "only a pass that closed a patch tells how long one takes"


def test_a_begun_step_is_taken_up_by_the_next(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, used = begun_steps(monkeypatch)
    run(make_engine(model, run_ahead="always"), [request("a", text(9, 1), 3 * MOST_LAUNCHED)])
    assert begun == [1, 1] and used == [True, True], "none after the last byte"


def test_a_begun_step_is_discarded_when_a_sequence_ends(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    law = SamplingParams(temperature=1.0, seed=2, logit_bias={EOS_ID: 4.0})
    requests = asked(sampling=law, ignore_eos=False, stop=[b"e"])
    wanted = run(make_engine(model), requests)
    begun, used = begun_steps(monkeypatch)
    engine = make_engine(model, run_ahead="always")
    found = run(engine, requests)
    assert {n: (out.ids, out.text) for n, out in found.items()} == {n: (o.ids, o.text) for n, o in wanted.items()}
    assert len(begun) > used.count(True)
    assert engine.stepper.stages.begun is None


def test_a_begun_step_is_discarded_when_a_sequence_is_preempted(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = run(make_engine(model), asked(40))
    begun, used = begun_steps(monkeypatch)
    engine = crowded_engine(model, max_length=128, max_sequences=40, run_ahead="always")
    assert {name: out.ids for name, out in run(engine, asked(40)).items()} == {n: o.ids for n, o in wanted.items()}
    assert engine.snapshot().preemptions and len(begun) > used.count(True)


def test_nothing_is_launched_ahead_without_pages(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, _ = begun_steps(monkeypatch)
    engine = make_engine(model, run_ahead="always")
    engine.memory.reserve_all = lambda *_: False  # type: ignore[method-assign]
    found = run(engine, [request("a", text(9, 1), 20)])["a"]
    assert engine.snapshot().steps == 20 == len(found.ids) and not begun


def test_no_byte_follows_an_eos_in_the_same_step_where_documents_are_isolated(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The EOS's patch may close with any byte after it, and another document begin: only the host plans that."""
    text_of = [1, *text(20, 3, specials=False)[1:], EOS_ID]
    for isolate in (True, False):
        engine = make_engine(model, run_ahead="always", isolate_documents=isolate)
        batches: list[int] = []
        unread = Stages.run_unread
        monkeypatch.setattr(
            Stages, "run_unread", lambda *given, unread=unread, seen=batches: (seen.append(1), unread(*given))[1]
        )
        engine.add(request("a", text_of, 30))
        engine.step()
        assert bool(batches) != isolate
        while engine.has_work:
            engine.step()
        assert batches
        monkeypatch.undo()


def test_patches_closed_together_read_the_global_weights_once(model: Path) -> None:
    plain, engine = (make_engine(model, run_ahead=policy) for policy in ("never", "always"))
    for each in (plain, engine):
        run(each, asked())
    one, other = plain.snapshot(), engine.snapshot()
    assert other.rows["global"] == one.rows["global"] and other.calls["global"] <= one.calls["global"]


def test_cached_prefixes_cost_no_additional_steps(model: Path) -> None:
    """All pages but those in use are kept for later texts, sooner or later."""
    steps = []
    for prefix_cache in (False, True):
        engine = crowded_engine(model, max_sequences=8, page_size=64, prefix_cache=prefix_cache, run_ahead="always")
        for n in range(3):
            run(engine, [request(str(i), text(150 + i, 8 * n + i), 40) for i in range(8)])
        steps.append(engine.snapshot().steps)
        assert prefix_cache == any(pool.cached > pool.total / 2 for pool in engine.snapshot().pools.values())
        assert not engine.snapshot().preemptions
    assert steps[0] == steps[1]


def test_beside_other_decoders_blt_makes_a_byte_a_step(model: Path) -> None:
    both = [request("blt", text(30, 1), 24), request("draft", text(30, 2), 200, decoder="blt-s", draft_length=2)]
    found = run(make_engine(model, run_ahead="always"), both)["blt"].ids
    assert found == run(make_engine(model), both[:1])["blt"].ids


def test_requests_go_byte_by_byte_to_their_min_tokens(model: Path) -> None:
    engine = make_engine(model, run_ahead="always")
    run(engine, [request("a", text(30, 2), 60, min_tokens=20, ignore_eos=False)])
    assert 20 <= engine.snapshot().steps < 40


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("kind", ["bytes", "drafts"])
def test_scores_come_with_bytes_that_were_launched_together(model: Path, kind: str, graphs: bool) -> None:
    steps, found = [], []
    for policy in ("always", "never"):
        engine = make_engine(model, run_ahead=policy, graphs=graphs)
        # Some of a batch with scores, and with different numbers of alternatives.
        both = [request(str(n), text(20 + n, n), 40, logprobs=top, **WAYS[kind]) for n, top in enumerate((2, None, 0))]
        out = run(engine, both)
        assert [len(out[name].logprobs) for name in "012"] == [len(out["0"].ids), 0, len(out["2"].ids)]
        assert {len(score.top) for score in out["0"].logprobs} == {2}
        assert not any(score.top for score in out["2"].logprobs)
        found.append((bills(out), {name: (each.ids, each.logprobs) for name, each in out.items()}))
        steps.append(engine.snapshot().steps)
    assert found[0] == found[1]
    if kind == "bytes" or not engine.stepper.stages.encoder.takes_cells:
        assert steps[0] < steps[1] / 2


@pytest.mark.parametrize("prompt", [text(30, 2), [1]], ids=len)
def test_a_prompt_is_scored_before_anything_runs_ahead(model: Path, prompt: list[int]) -> None:
    scored = request("a", prompt, 20, prompt_logprobs=True, logprobs=None)
    engine = make_engine(model, run_ahead="always")
    found = run(engine, [scored])["a"]
    assert [score.id for score in found.prompt_logprobs] == prompt
    assert found.ids == run(make_engine(model), [scored])["a"].ids
    assert engine.snapshot().steps < 20


def test_the_last_patch_that_fits_has_the_same_bytes(model: Path, tmp_path: Path) -> None:
    """A text ends with the first byte of a patch that the caches could not hold."""
    made = load(model)
    few = replace(made.config, global_=replace(made.config.global_, max_positions=12))
    save_ours(tmp_path / "model", (few, made.tensors))
    plain, engine = (make_engine(tmp_path / "model", run_ahead=policy) for policy in ("never", "always"))
    wanted, found = run(plain, asked(2)), run(engine, asked(2))
    assert all(0 < len(out.ids) < 30 for out in wanted.values())
    assert bills(found) == bills(wanted)


def test_no_step_is_begun_for_cells_that_are_encoded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft whose prompt another has left in the cache begins without a row of its own."""

    def texts(policy: Policy) -> dict[str, list[int]]:
        engine = make_engine(model, page_size=64, run_ahead=policy)
        outputs = {name: Output() for name in ("warm", "blt", "drafts")}

        def step() -> None:
            for event in engine.step():
                outputs[event.id].take(event)

        engine.add(request("warm", text(65, 3), 4))
        while engine.has_work:
            step()
        engine.add(request("blt", text(20, 1), 60))
        for _ in range(3):
            step()
        engine.add(request("drafts", text(65, 3), 20, decoder="blt-s"))
        while engine.has_work:
            step()
        assert usage(outputs["drafts"]).cached_tokens == 64
        return {name: output.ids for name, output in outputs.items()}

    wanted = texts("never")
    begun, _ = begun_steps(monkeypatch)
    assert texts("always") == wanted
    assert begun


@pytest.mark.parametrize(
    ("seconds", "count"), [(0.0, 1), (LAUNCH_SECONDS / 3.5, 3), (1.0, 1), (1e-6, MOST_LAUNCHED)], ids=str
)
def test_as_measured_a_launch_takes_no_longer_than_a_new_request_may_wait(
    model: Path, seconds: float, count: int
) -> None:
    engine = make_engine(model, run_ahead="measured")
    engine.add(request("a", text(9, 1), 30))
    engine.step()
    engine.ledger.latency.byte = lambda sequences: seconds  # type: ignore[method-assign]
    (sequence,) = engine.running
    rows = Rows.of(sequence, sequence.next_ask(64))
    assert engine.stepper.ahead._num_bytes([rows]) == count


def test_the_time_of_a_byte_is_that_of_all_stages() -> None:
    costs = LatencyModel(drafts_encode=False)
    assert not costs.byte(1), "nothing is known"
    for stage, seconds in zip(STAGES, (1.0, 2.0, 4.0, 8.0), strict=True):
        costs.observe(stage, 1, seconds)
    assert costs.byte(1) == pytest.approx(15.0)


@pytest.mark.parametrize("policy", ["never", "always"])
@pytest.mark.parametrize("decoder", ["blt", "blt-s"])
def test_the_host_knows_what_the_device_wrote_for_a_row_that_failed(
    model: Path, monkeypatch: pytest.MonkeyPatch, policy: Any, decoder: Any
) -> None:
    """Or the slot's next text would be taken for what is there."""
    engine, noted = make_engine(model, graphs=True, run_ahead=policy), []
    engine.memory.slots.note_read = lambda sequence, place, ids: noted.append(place)  # type: ignore[method-assign]
    for module in ("results", "ahead"):
        monkeypatch.setattr(f"engine.step.{module}.are_distributions", lambda bests: False)
    prompt = text(20, 3, specials=False)
    engine.add(request("it", prompt, 30, decoder=decoder))
    events = []
    while engine.has_work:
        events += engine.step()
    assert isinstance(events[-1], Failed) and noted and noted[0] == len(prompt)
