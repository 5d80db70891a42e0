"""Passes after a step of blt: fewer steps, the same bytes, the same bill."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint import load
from engine.config import EOS_ID
from engine.costs.latency import BYTE_AHEAD, LatencyModel
from engine.engine import Engine
from engine.step.ahead.bytes import PROBE_INTERVAL
from engine.types import Request, SamplingParams
from tests.engines import bill, crowded_engine, feeding, make_engine, request, run, save_ours, usage
from tests.models import our_config, our_model, text

HOW: list[dict[str, Any]] = [
    {},
    {"sampling": SamplingParams(temperature=1.0, top_p=0.9, seed=1)},
    {"sampling": SamplingParams(temperature=1.0, seed=2, logit_bias={EOS_ID: 3.0, 100: -2.0})},
    {"ignore_eos": False, "sampling": SamplingParams(temperature=0.8, seed=3, logit_bias={EOS_ID: 2.0})},
    {"stop": [b"e", b"th"], "sampling": SamplingParams(temperature=0.8, seed=4)},
]


@pytest.fixture(scope="module", params=["embedding", "encoder"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both forms of decoder: with bytes of its own, and behind the encoder's states. Patches have 2 bytes and more."""
    config, tensors = our_model(replace(our_config(decoder_input=request.param), isolate_documents=True), 5)
    rule = replace(config.patching, max_patch_length=5)
    return save_ours(tmp_path_factory.mktemp("feeding") / "model", (replace(config, patching=rule), tensors))


def asked(how: dict[str, Any], count: int = 5) -> list[Request]:
    return [request(str(n), text(20 + 7 * (n % 5), n), 30 + 11 * (n % 5), **how) for n in range(count)]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("graphs", [False, True])
def test_passes_after_a_step_keep_bytes_and_usage(model: Path, how: dict[str, Any], graphs: bool) -> None:
    plain = feeding(make_engine(model), runs_on=False)
    wanted = run(plain, asked(how))
    engine = feeding(make_engine(model, graphs=graphs), runs_on=True)
    found = run(engine, asked(how))
    assert {name: out.ids for name, out in found.items()} == {name: out.ids for name, out in wanted.items()}
    if "stop" not in how:  # Passes after a stop string did run.
        assert {name: bill(out) for name, out in found.items()} == {name: bill(out) for name, out in wanted.items()}
    assert engine.snapshot().steps < plain.snapshot().steps


def test_unused_passes_after_a_step_are_charged_to_no_request_but_timed(model: Path) -> None:
    """Prompts of one id: every row belongs to a request."""
    engine = feeding(make_engine(model), runs_on=True)
    seen: dict[str, list[int]] = {}
    saw = engine.ledger.latency.observe
    engine.ledger.latency.observe = lambda stage, rows, seconds: (  # type: ignore[method-assign]
        seen.setdefault(stage, []).append(rows), saw(stage, rows, seconds)
    )[1]  # fmt: skip
    usages = [usage(output) for output in run(engine, [request(str(n), [1], 40) for n in range(4)]).values()]
    counts = engine.ledger.total
    for stage, rows in counts.rows.items():
        assert rows == sum(u.rows[stage] for u in usages), stage
    assert len(seen["patcher"]) > counts.calls["patcher"], "some passes were in vain"
    assert set(seen["patcher"]) == set(seen["decoder"]) == {4}, "and are known for what they took"


def test_patches_closed_together_read_the_global_weights_less_often(model: Path) -> None:
    engines = [feeding(make_engine(model), runs_on=runs_on) for runs_on in (False, True)]
    for engine in engines:
        run(engine, asked({}))
    apart, together = (engine.snapshot() for engine in engines)
    assert together.calls["global"] < apart.calls["global"] and together.rows["global"] == apart.rows["global"]
    assert together.read_bytes["global"] < apart.read_bytes["global"]


def test_passes_after_a_step_write_the_same_bytes_with_little_memory(model: Path) -> None:
    wanted = run(feeding(make_engine(model), runs_on=False), asked({}, 40))
    engine = feeding(crowded_engine(model, max_length=128, max_sequences=40), runs_on=True)
    assert {name: out.ids for name, out in run(engine, asked({}, 40)).items()} == {n: o.ids for n, o in wanted.items()}
    assert engine.snapshot().preemptions


def test_cached_prefixes_cost_no_additional_steps(model: Path) -> None:
    """All pages but those in use are kept for texts to come, sooner or later."""
    steps = []
    for prefix_cache in (False, True):
        engine = feeding(crowded_engine(model, max_sequences=8, page_size=64, prefix_cache=prefix_cache), runs_on=True)
        for n in range(6):
            run(engine, [request(str(i), text(150 + i, 8 * n + i), 40) for i in range(8)])
        steps.append(engine.snapshot().steps)
        assert bool(prefix_cache) == any(pool.cached > pool.total / 2 for pool in engine.snapshot().pools.values())
        assert not engine.snapshot().preemptions
    assert steps[0] == steps[1]


def test_beside_other_decoders_blt_feeds_bytes_step_by_step(model: Path) -> None:
    engine = feeding(make_engine(model), runs_on=True)
    both = [request("blt", text(30, 1), 24), request("draft", text(30, 2), 200, decoder="blt-s", draft_length=2)]
    found = run(engine, both)["blt"].ids
    assert found == run(make_engine(model), both[:1])["blt"].ids


def test_requests_with_scores_or_penalties_are_fed_step_by_step(model: Path) -> None:
    sampling = SamplingParams(temperature=0.7, seed=4, presence_penalty=0.5)
    for how in ({"logprobs": 2}, {"sampling": sampling}):
        engine = feeding(make_engine(model), runs_on=True)
        run(engine, [request("a", text(30, 2), 20, **how)])
        assert engine.snapshot().steps >= 20


def test_a_prompt_is_scored_before_passes_after_a_step_begin(model: Path) -> None:
    scored = request("a", text(30, 2), 20, prompt_logprobs=True, logprobs=None)
    engine = feeding(make_engine(model), runs_on=True)
    found = run(engine, [scored])["a"]
    assert len(found.prompt_logprobs) == 30
    assert found.ids == run(feeding(make_engine(model), runs_on=False), [scored])["a"].ids
    assert engine.snapshot().steps < 20


def test_a_prompt_of_one_id_is_scored(model: Path) -> None:
    found = run(feeding(make_engine(model), runs_on=True), [request("a", [1], 20, prompt_logprobs=True)])["a"]
    assert [score.id for score in found.prompt_logprobs] == [1] and len(found.ids) == 20


def test_the_last_patch_that_fits_has_the_same_bytes_with_passes_after_a_step(model: Path, tmp_path: Path) -> None:
    """A text ends with the first byte of a patch that the caches could not hold."""
    made = load(model)
    few = replace(made.config, global_=replace(made.config.global_, max_positions=12))
    save_ours(tmp_path / "model", (few, made.tensors))
    plain, ahead = (feeding(make_engine(tmp_path / "model"), runs_on=runs_on) for runs_on in (False, True))
    wanted, found = run(plain, asked({}, 2)), run(ahead, asked({}, 2))
    assert all(0 < len(out.ids) < 30 for out in wanted.values())
    assert {name: bill(out) for name, out in found.items()} == {name: bill(out) for name, out in wanted.items()}
    assert ahead.snapshot().steps < plain.snapshot().steps


def unpromising(model: Path) -> Engine:
    """Once a pass took a quarter of an hour."""
    engine = make_engine(model)
    engine.ledger.latency.calibrate(BYTE_AHEAD, 1, 1e3)
    return engine


def test_an_unpromising_pass_is_tried_again_at_intervals(model: Path) -> None:
    """Else one unlucky measurement would rule them out for good."""
    engine = unpromising(model)
    tried: list[str] = []
    saw = engine.ledger.latency.observe
    engine.ledger.latency.observe = lambda stage, *rest: (tried.append(stage), saw(stage, *rest))[1]  # type: ignore[method-assign]
    run(engine, [request(name, text(20, 1), 2 * PROBE_INTERVAL) for name in "ab"])
    assert 1 <= tried.count(BYTE_AHEAD) <= 2


def test_a_cpu_tries_no_unpromising_pass_for_a_sequence_alone(model: Path) -> None:
    engine = unpromising(model)
    engine.ledger.latency.observe = lambda stage, *_: pytest.fail("tried") if stage == BYTE_AHEAD else None  # type: ignore[method-assign]
    run(engine, [request("a", text(20, 1), PROBE_INTERVAL + 10)])


def test_no_unpromising_pass_is_tried_when_no_byte_could_follow(model: Path) -> None:
    engine = unpromising(model)
    engine.ledger.latency.observe = lambda stage, *_: pytest.fail("tried") if stage == BYTE_AHEAD else None  # type: ignore[method-assign]
    for n in range(PROBE_INTERVAL + 1):
        run(engine, [request(name, [1, 5], 1) for name in (f"{n}", f"{n} too")])


def test_the_expected_patch_length_is_at_least_one_byte(model: Path) -> None:
    """After a BOS alone the next patch has begun, too."""
    engine, patches = make_engine(model), []
    feeding = engine.ledger.latency.byte_ahead
    engine.ledger.latency.byte_ahead = lambda size, patch: patches.append(patch) or feeding(size, patch)  # type: ignore[method-assign, func-returns-value]
    run(engine, [request(str(n), [1], 3) for n in range(2)])
    assert patches and min(patches) == 1


def learnt(**seconds: float) -> LatencyModel:
    costs = LatencyModel(drafts_encode=False)
    for stage, one in seconds.items():
        for rows in (1, 8, 64):
            costs.observe(stage, rows, one)
    return costs


def test_the_relative_cost_of_a_pass_follows_from_stage_costs() -> None:
    local = {"patcher": 1.0, "encoder": 1.0, "decoder": 2.0}
    assert LatencyModel(drafts_encode=False).byte_ahead(1, 4.0) == 1.0, "nothing is known"
    assert learnt(**local).byte_ahead(1, 4.0) == 1.0, "nothing to save"
    # Alone a sequence closes its patches one by one in any case: it saves the host's time.
    assert learnt(**local, step=4.0, **{"global": 40.0}).byte_ahead(1, 4.0) == pytest.approx(0.5)
    crowd = learnt(**local, step=4.0, **{"global": 40.0}).byte_ahead(1000, 4.0)
    assert crowd == pytest.approx(4 / (8 + 0.75 * 40))
    # Where the host computes too, as on a CPU, a pass takes as long as it does.
    assert learnt(**local, step=4.0, byte_ahead=8.0).byte_ahead(1, 4.0) == pytest.approx(1.0)
