"""The policy for running ahead: what each kind of work does under it, and that no text depends on it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.config import Policy
from engine.engine import Engine
from engine.step.ahead.policy import RunAhead
from engine.types import Request, UnmaskRule
from tests.engines import bill, make_engine, request, run, save_ours
from tests.models import our_config, our_model, text

WAYS: dict[str, dict[str, Any]] = {
    "bytes": {},
    "next_step": {},
    "drafts": {"decoder": "blt-s", "draft_length": 6},
    "blocks": {"decoder": "blt-d", "unmask": UnmaskRule(rule="confidence", alpha=0.6)},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = our_model(our_config(decoder_input="embedding", mask_id=260, block_size=6), 5)
    return save_ours(tmp_path_factory.mktemp("ahead") / "model", made)


def asked(kind: str) -> list[Request]:
    return [request("a", text(30, 2), 60, **WAYS[kind])]


def waits(engine: Engine, kind: str) -> int:
    """How often the host reads a result: steps, or for blocks launches of passes. After a request that taught the
    engine how many passes blocks take."""
    run(engine, asked(kind))
    launches, before = 0, engine.snapshot().steps
    launch = engine.stepper.stages.decoder.launch_passes

    def counted(*given: Any) -> Any:
        nonlocal launches
        launches += 1
        return launch(*given)

    engine.stepper.stages.decoder.launch_passes = counted  # type: ignore[method-assign]
    run(engine, asked(kind))
    return launches if kind == "blocks" else engine.snapshot().steps - before


@pytest.mark.parametrize("kind", ["bytes", "drafts", "blocks"])
def test_run_ahead_always_waits_less_than_never_for_each_kind_of_work_alone(model: Path, kind: str) -> None:
    never, always = RunAhead.everywhere("never"), RunAhead.everywhere("always")
    found = {}
    for name, ahead in (
        ("never", never),
        ("always", always),
        ("this alone", replace(never, **{kind: "always"})),
        ("all but this", replace(always, **{kind: "never"}, next_step="never")),
    ):
        engine = make_engine(model, prefix_cache=False)
        engine.stepper.ahead.policy = ahead
        found[name] = waits(engine, kind)
    assert found["always"] == found["this alone"] < found["never"] == found["all but this"]


def test_the_policy_decides_whether_the_next_step_is_launched_ahead(model: Path) -> None:
    for policy, begins in (("always", True), ("never", False)):
        engine = make_engine(model, prefix_cache=False)
        engine.stepper.ahead.policy = replace(RunAhead.everywhere("never"), next_step=policy)
        begun: list[int] = []
        start = engine.stepper.stages.begin
        engine.stepper.stages.begin = lambda batch, windows, begun=begun, start=start: (  # type: ignore[method-assign,misc]
            begun.append(len(batch)) or start(batch, windows)  # type: ignore[func-returns-value]
        )
        run(engine, asked("next_step"))
        assert bool(begun) == begins


@pytest.mark.parametrize("kind", WAYS)
def test_text_and_usage_do_not_depend_on_the_run_ahead_policy(model: Path, kind: str) -> None:
    policies: tuple[Policy, ...] = ("measured", "always", "never")
    engines = [make_engine(model, run_ahead=policy) for policy in policies]
    assert [engine.stepper.ahead.policy for engine in engines] == [RunAhead.everywhere(policy) for policy in policies]
    first, *others = [{name: bill(out) for name, out in run(engine, asked(kind)).items()} for engine in engines]
    assert all(other == first for other in others) and first
