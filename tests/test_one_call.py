"""A step as one call into C gives what the stages give one by one: texts, usage, scores, in any company."""

import ctypes
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import EOS_ID, PatchingRule, Policy
from engine.costs.latency import MOST_CALLED
from engine.engine import Engine
from engine.step import one_call
from engine.types import Request, SamplingParams, UnmaskRule
from kernels import native
from kernels.native.step import AskKind, sizes
from tests.engines import bill, crowded_engine, make_engine, request, run, save_ours, usage
from tests.models import our_config, our_model, text

pytestmark = pytest.mark.skipif(not native.LIBRARY, reason="kernels/native is not compiled")

FORMS: dict[str, dict[str, Any]] = {
    "embedding": {"decoder_input": "embedding", "mask_id": 260, "block_size": 6},
    "encoder": {"decoder_input": "encoder"},
    "isolated": {"decoder_input": "embedding", "mask_id": 260, "block_size": 6},
}
RULES = [
    PatchingRule(threshold=5.45, max_patch_length=5),
    PatchingRule(threshold=0.0, monotonic=True),
    PatchingRule(threshold=5.4, threshold_add=0.0),
]


@pytest.fixture(scope="module", params=[(form, rule) for form in FORMS for rule in range(len(RULES))], ids=str)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    form, rule = request.param
    config = replace(our_config(**FORMS[form]), isolate_documents=form == "isolated", patching=RULES[rule])
    return save_ours(tmp_path_factory.mktemp("one_call") / "model", our_model(config, 5))


def stages_apart(engine: Engine) -> Engine:
    assert engine.stepper.one_call, "the machine's kernels have no such call"
    engine.stepper.one_call = None
    engine.stepper.ahead.policy = "never"
    return engine


@st.composite
def requests(draw: st.DrawFn, decoders: list[str]) -> Request:
    sampling = draw(
        st.sampled_from(
            [
                SamplingParams(temperature=0),
                SamplingParams(temperature=1.0, seed=3),
                SamplingParams(temperature=0.8, top_p=0.9, top_k=40, min_p=0.02, seed=2**63 + 5),
                SamplingParams(temperature=1.2, seed=-4, logit_bias={EOS_ID: 4.0, 100: -2.0}),
                SamplingParams(temperature=0, logit_bias={EOS_ID: 2.0, 70: 3.0}),
                SamplingParams(temperature=0.7, seed=4, presence_penalty=0.5, frequency_penalty=0.3),
                SamplingParams(temperature=0.9, seed=8, repetition_penalty=1.2, logit_bias={70: 1.5}),
                SamplingParams(
                    temperature=0,
                    presence_penalty=0.3,
                    frequency_penalty=0.7,
                    repetition_penalty=0.7,
                    allowed_ids=[EOS_ID, *range(60, 140)],
                    logit_bias={EOS_ID: 2.0, 80: -3.0},
                ),
                SamplingParams(
                    temperature=1.0, seed=6, allowed_ids=[EOS_ID, *range(60, 110)], logit_bias={EOS_ID: 4.0}
                ),
            ]
        )
    )
    decoder = draw(st.sampled_from(decoders))
    how: dict[str, Any] = {"decoder": decoder, "sampling": sampling, "ignore_eos": draw(st.booleans())}
    count = draw(st.sampled_from([1, 2, 7, 25]))
    how["min_tokens"] = draw(st.sampled_from([0, 0, count // 2, count]))
    if decoder in ("blt-d", "blt-dv"):
        rules = UnmaskRule(rule="confidence", alpha=0.3, top_p=0.8), UnmaskRule(rule="entropy", gamma=1.0)
        how["unmask"] = draw(st.sampled_from([*rules, UnmaskRule(rule="one_step")]))
    if decoder == "blt-s":
        how["draft_length"] = draw(st.integers(1, 9))
    scores = draw(st.sampled_from([{}, {}, {"logprobs": 2}, {"prompt_logprobs": True, "logprobs": 0}]))
    length = draw(st.sampled_from([1, 2, 9, 30, 90]))
    prompt = text(length, draw(st.integers(0, 5)))
    if length > 9 and draw(st.booleans()):
        prompt[length // 2] = EOS_ID
    return request("", prompt, count, **how, **scores)


def engine_with_cache(model: Path, rows: int, **config: Any) -> Engine:
    """On a processor whose cache holds so many rows for drafts."""
    read = make_engine(model).ledger.stage_bytes
    size = (read.weights["decoder"] + rows * read.kv_row["decoder"]) / one_call.CACHE_SHARE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_call, "processor_cache", lambda: math.ceil(size))
        return make_engine(model, **config)


@settings(max_examples=4)
@given(st.data())
def test_one_call_gives_what_the_stages_give_one_by_one(model: Path, data: st.DataObject) -> None:
    apart = stages_apart(make_engine(model, max_step_rows=40))
    engine = engine_with_cache(model, data.draw(st.sampled_from([0, 1, 50])), max_step_rows=40)
    decoders = [name for name in engine.limits.decoders if name != "auto"]
    asked = data.draw(st.lists(requests(decoders), min_size=1, max_size=5))
    asked = [Request(**{**{f: getattr(r, f) for f in r.__struct_fields__}, "id": str(n)}) for n, r in enumerate(asked)]
    engine.stepper.ahead.policy = data.draw(st.sampled_from(["always", "measured", "never"]))
    wanted, found = run(apart, asked), run(engine, asked)
    for name, out in wanted.items():
        assert found[name].ids == out.ids, name
        assert found[name].logprobs == out.logprobs and found[name].prompt_logprobs == out.prompt_logprobs, name
        # A step that is full runs the bytes of a block before the next block, in a call of their own.
        calls_differ = asked[int(name)].decoder == "blt-d"
        bills = [bill(each)[:3] if calls_differ else bill(each) for each in (found[name], out)]
        assert bills[0] == bills[1], name


CROWD = {"max_length": 128, "max_sequences": 40}


def crowd() -> list[Request]:
    return [request(str(n), text(20 + n % 30, n), 60) for n in range(40)]


@pytest.fixture(scope="module")
def crowds_ids(model: Path) -> dict[str, list[int]]:
    """By the stages one by one."""
    return {name: out.ids for name, out in run(stages_apart(crowded_engine(model, **CROWD)), crowd()).items()}


@pytest.mark.parametrize("policy", ["always", "measured", "never"])
def test_one_call_gives_the_same_with_little_memory(
    model: Path, policy: Policy, crowds_ids: dict[str, list[int]]
) -> None:
    engine = crowded_engine(model, **CROWD)
    engine.stepper.ahead.policy = policy
    assert {name: out.ids for name, out in run(engine, crowd()).items()} == crowds_ids
    assert engine.snapshot().preemptions


@pytest.mark.parametrize("logprobs", [None, 2])
def test_blt_runs_several_bytes_in_a_step(model: Path, logprobs: int | None) -> None:
    engine = make_engine(model)
    engine.stepper.ahead.policy = "always"
    ids = run(engine, [request("a", text(30, 2), 64, logprobs=logprobs)])["a"].ids
    assert engine.snapshot().steps <= 64 // one_call.MOST_CALLED + ids.count(EOS_ID)


@pytest.mark.parametrize("logprobs", [None, 2])
@pytest.mark.parametrize("decoder", ["blt-s", "blt-dv"])
def test_drafts_are_verified_in_the_step_that_makes_them(model: Path, decoder: str, logprobs: int | None) -> None:
    engine = make_engine(model)
    if decoder not in engine.limits.decoders:
        pytest.skip("the model has no [MASK]")
    asked = request("a", text(30, 2), 64, decoder=decoder, ignore_eos=True, logprobs=logprobs)
    out = run(engine, [asked])["a"]
    rounds = usage(out).rounds
    assert engine.snapshot().steps <= rounds + 1 + out.ids.count(EOS_ID)


@pytest.mark.parametrize("model", [("embedding", 0)], indirect=True, ids=str)
@pytest.mark.parametrize("seconds", [0.0, 1e-9, 60.0])
@pytest.mark.parametrize("decoder", ["blt-s", "blt-d", "blt-dv"])
def test_a_step_has_as_many_rounds_as_it_has_bytes_and_time_for(
    model: Path, decoder: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model)
    engine.stepper.ahead.policy = "measured" if seconds else "always"
    monkeypatch.setattr(one_call, "CALL_SECONDS", seconds)
    count, drafts = 2 * MOST_CALLED, {"draft_length": 3, "block_size": 3}
    sampling = SamplingParams(temperature=0, logit_bias={EOS_ID: -100.0})
    out = run(engine, [request("a", text(30, 2), count, decoder=decoder, sampling=sampling, **drafts)])["a"]
    assert usage(out).rounds >= count // 4
    if seconds == 1e-9:
        # But for the first, which knows no time yet.
        assert engine.snapshot().steps >= usage(out).rounds - 2
    else:
        # The prompt is a step, the first round another, and so is each of the last drafts, which are shorter.
        assert engine.snapshot().steps <= count / MOST_CALLED + 6


@pytest.mark.parametrize("model", [("embedding", 0)], indirect=True, ids=str)
@pytest.mark.parametrize(
    "how", [{"draft_length": 2}, {"draft_length": 8}, {"rule": "one_step"}, {"rule": "confidence"}]
)
@pytest.mark.parametrize("decoder", ["blt", "blt-s", "blt-d", "blt-dv"])
def test_no_step_makes_more_passes_than_its_time_is_bounded_for(
    model: Path, decoder: str, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, told = make_engine(model), list[int]()
    engine.stepper.ahead.policy = "always"
    monkeypatch.setattr(engine.ledger.latency, "whole_step", lambda rows, passes: told.append(passes) or 0.0)
    fields = {"unmask": UnmaskRule(rule=how["rule"], alpha=1.0)} if "rule" in how else how
    for number in (1, 4):
        for n in range(number):
            engine.add(request(str(n), text(20, n), 100, decoder=decoder, ignore_eos=True, **fields))
        while engine.has_work:
            before = engine.snapshot().calls["decoder"]
            engine.step()
            engine.step_bound()
            assert engine.snapshot().calls["decoder"] - before <= told[-1]


class Hopeful(defaultdict[type, int]):
    """Expects time for any number of rounds, whatever it is told."""

    def __missing__(self, key: type) -> int:
        return 1000

    def __setitem__(self, key: type, value: int) -> None:
        pass


@pytest.mark.parametrize("model", [("embedding", 0)], indirect=True, ids=str)
@pytest.mark.parametrize("decoder", ["blt", "blt-s"])
def test_c_begins_no_round_that_would_end_too_late(model: Path, decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(model)
    assert engine.stepper.one_call
    engine.stepper.one_call._likely_rounds = Hopeful()
    for seconds, is_apart in ((1e-9, True), (60.0, False)):
        monkeypatch.setattr(one_call, "CALL_SECONDS", seconds)
        before = engine.snapshot().steps
        asked = request("a", text(30, 2), 40, decoder=decoder, draft_length=3, ignore_eos=True)
        out = run(engine, [asked])["a"]
        # It knows how long a round takes after two.
        assert (2 * (engine.snapshot().steps - before) >= usage(out).rounds) == is_apart


@pytest.mark.parametrize("decoder", ["blt", "blt-s", "blt-d", "blt-dv"])
def test_nothing_is_made_or_counted_after_a_text_has_ended(model: Path, decoder: str) -> None:
    """By a stop string of one byte or of two, a stop id, or in the middle of a draft."""

    if decoder not in make_engine(model).limits.decoders:
        pytest.skip("the model has no [MASK]")

    def found(policy: Policy, stop: list[bytes], ids: list[int]) -> tuple[Any, ...]:
        engine = make_engine(model)
        engine.stepper.ahead.policy = policy
        how: dict[str, Any] = {"decoder": decoder, "stop": stop, "stop_ids": ids, "trace": True}
        outputs = run(engine, [request(str(n), text(30, n), 60, **how) for n in range(8)])
        usages = [(u.rounds, u.drafted, u.accepted, bill(out)) for out in outputs.values() for u in [usage(out)]]
        traces = [(out.ids, out.rounds) for out in outputs.values()]
        return usages, traces, engine.ledger.accepted_runs[decoder]

    outputs = run(make_engine(model), [request(str(n), text(30, n), 60, decoder=decoder) for n in range(3)])
    stops = [outputs["0"].text[20:22], outputs["1"].text[-20:-19]], [outputs["2"].ids[30]]
    assert found("always", *stops) == found("never", *stops) != found("never", [], [])


def test_more_rows_than_a_step_may_have_are_verified_in_another(model: Path) -> None:
    asked = [request(str(n), text(20, n), 40, decoder="blt-s", draft_length=9) for n in range(4)]
    engine, small = make_engine(model), make_engine(model, max_step_rows=30)
    found, wanted = run(engine, asked), run(small, asked)
    assert {name: out.ids for name, out in found.items()} == {name: out.ids for name, out in wanted.items()}
    assert small.snapshot().steps > engine.snapshot().steps


def test_drafts_whose_rows_the_cache_does_not_hold_take_turns(model: Path) -> None:
    asked = [request(str(n), text(20, n), 9, decoder="blt-s", draft_length=8, ignore_eos=True) for n in range(4)]
    wide, narrow = engine_with_cache(model, 1000), engine_with_cache(model, 50)
    found, wanted = run(narrow, asked), run(wide, asked)
    assert {name: out.ids for name, out in found.items()} == {name: out.ids for name, out in wanted.items()}
    # One pass of all over their prompts, which gives the first byte of each draft; then 20 to 28 rows each.
    calls, together = narrow.snapshot().calls["decoder"], wide.snapshot().calls["decoder"]
    assert together < calls <= 2 * together
    assert bill(found["0"]) == bill(wanted["0"])


def test_structs_are_as_large_as_in_c() -> None:
    assert native.LIBRARY
    found = (ctypes.c_int64 * 3)()
    native.LIBRARY.fastblt_step_sizes(found)
    assert tuple(found) == sizes()


def test_asks_are_numbered_as_in_c() -> None:
    source = (Path(native.__file__).parent / "step.h").read_text()
    names = next(line for line in source.splitlines() if line.startswith("enum { PREFILL"))
    assert [ask.name for ask in AskKind] == names.strip("enum {};").split(", ")
