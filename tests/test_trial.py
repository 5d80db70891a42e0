"""Costs of steps: tried on an engine that then is as if it had not, kept in a file, bounded in time."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.calibrate import measure
from engine.config import EngineConfig
from engine.costs import calibration as trial
from engine.costs.calibration import LEAST_PROMPT_ROWS, MeasuredStep, measure_steps, prompt_rows
from engine.costs.latency import LatencyModel
from tests.engines import make_engine, request, run

STAGES = {"patcher", "encoder", "global", "decoder", "step"}


def test_calibration_leaves_the_engine_in_its_initial_state(tiny: Path) -> None:
    new, tried = make_engine(tiny), make_engine(tiny)
    tried.calibrate()
    assert tried.snapshot() == new.snapshot()
    assert not tried.has_work
    tried.memory.caches.check_integrity()
    asked = [request("a", trial.PROMPT, 20), request("b", trial.PROMPT[:100], 20)]
    found, wanted = run(tried, asked), run(new, asked)
    assert {name: (o.ids, o.text) for name, o in found.items()} == {n: (o.ids, o.text) for n, o in wanted.items()}
    assert found["a"].end.usage.cached_tokens == 0  # type: ignore[union-attr]


def test_calibration_measures_every_stage_and_sets_prompt_rows(tiny: Path) -> None:
    engine = make_engine(tiny, max_stall_ms=0.0)
    assert engine.info().prompt_rows == EngineConfig("").max_step_rows
    engine.calibrate()
    costs = engine.ledger.latency
    assert all(costs.seconds(stage, 4) > 0 for stage in STAGES)
    assert LEAST_PROMPT_ROWS <= engine.info().prompt_rows <= EngineConfig("").max_step_rows
    assert engine.info().prompt_rows == engine.prompt_rows
    patient = make_engine(tiny, max_step_rows=77, max_stall_ms=60_000.0)
    patient.calibrate()
    assert patient.info().prompt_rows == 77


def test_stage_costs_are_read_from_the_file_only_for_the_same_model(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    first = make_engine(tiny, stage_costs=str(file))
    first.calibrate()
    content = file.read_bytes()
    second = make_engine(tiny, stage_costs=str(file))
    second.calibrate()
    assert file.read_bytes() == content
    assert second.ledger.latency.next_byte(4.0) == first.ledger.latency.next_byte(4.0)
    assert second.info().prompt_rows == first.info().prompt_rows
    make_engine(tiny, stage_costs=str(file), dtype="bfloat16").calibrate()
    assert file.read_bytes() != content
    assert [path.name for path in tmp_path.iterdir()] == ["costs.json"]


@pytest.mark.parametrize("content", ["", "{}", '{"of": {}, "steps": []}', '{"of": {}, "steps": [{"rows": "x"}]}'])
def test_a_file_without_stage_costs_is_moved_aside_and_made_anew(tiny: Path, tmp_path: Path, content: str) -> None:
    file = tmp_path / "costs.json"
    file.write_text(content)
    make_engine(tiny, stage_costs=str(file)).calibrate()
    assert (tmp_path / "costs.json.bad").read_text() == content
    assert trial.read(file, json.loads(file.read_text())["of"])


def test_an_engine_starts_where_its_stage_costs_can_be_neither_read_nor_written(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(tiny, stage_costs=str(tmp_path))
    engine.calibrate()
    assert engine.info().prompt_rows and list(tmp_path.iterdir()) == []
    assert [record.getMessage()[:14] for record in caplog.records if record.levelname == "WARNING"] == [
        "--stage-costs:"
    ] * 2


@given(fixed=st.floats(1e-4, 0.9), per_row=st.floats(0, 0.05))
def test_calibration_ends_within_its_time_budget(fixed: float, per_row: float) -> None:
    now = 0.0

    def step(rows: int) -> MeasuredStep:
        nonlocal now
        seconds = fixed + per_row * rows
        now += seconds
        return MeasuredStep(rows, {"decoder": (rows, 0.8 * seconds), "step": (rows, 0.2 * seconds)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial.time, "perf_counter", lambda: now)
        found = measure_steps(step, 100, lambda: 0)
    assert [tried.rows for tried in found] == [1, 4, 16, 64, 100][: len(found)]
    # What a few rows take is not known before: then a guess may be wrong once.
    assert now <= max(2.0, trial.MOST_SECONDS + 3 * per_row)
    assert len(found) == 5 or now + fixed + per_row * 100 > trial.SECONDS


@given(fixed=st.floats(2e-3, 0.02), recording=st.floats(0.1, 40))
def test_steps_that_record_graphs_are_not_measured(fixed: float, recording: float) -> None:
    now = 0.0
    recorded: set[int] = set()

    def step(rows: int) -> MeasuredStep:
        nonlocal now
        seconds = fixed if rows in recorded else fixed + recording
        now += seconds
        recorded.add(rows)
        return MeasuredStep(rows, {"step": (rows, seconds)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial.time, "perf_counter", lambda: now)
        found = measure_steps(step, 100, lambda: len(recorded))
    assert all(tried.seconds == pytest.approx(fixed) for tried in found)
    # What is recorded takes time of its own, and no further rows are tried once that is up.
    assert now - len(recorded) * (fixed + recording) <= trial.MOST_SECONDS
    assert (len(recorded) - 1) * recording < trial.MOST_RECORDING_SECONDS
    assert len(found) == 5 or len(recorded) * (fixed + recording) >= trial.MOST_RECORDING_SECONDS


def test_an_engine_with_graphs_is_measured_after_recording(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(tiny, graphs=True)
    executor, counts = engine.stepper.executor, []
    monkeypatch.setattr(trial, "SECONDS", 0.0)
    step = engine.step
    engine.step = lambda: (step(), counts.append(executor.num_recorded))[0]  # type: ignore[method-assign,func-returns-value]
    steps = {tried.rows: tried for tried in measure(engine)}
    assert list(steps) == list(trial.MEASURED_ROWS)
    assert all(set(tried.stages) == STAGES for tried in steps.values()), "of steps that record no stage is heard"
    assert len(counts) == 2 * len(steps) and len(set(counts)) == len(steps)


def test_prompt_rows_are_least_when_only_one_step_was_measured() -> None:
    assert prompt_rows([MeasuredStep(1, {"decoder": (1, 1.0)})], 0.05, 512) == LEAST_PROMPT_ROWS
    assert prompt_rows([MeasuredStep(1, {"decoder": (1, 1.0)})], 0.05, 8) == 8


def test_the_latency_model_starts_from_calibrated_costs() -> None:
    costs = LatencyModel(drafts_encode=False)
    for rows in (1, 4, 16, 64):
        costs.calibrate("decoder", rows, 1.0 + 0.5 * rows)
    costs.calibrate("decoder", 256, 1000.0)
    assert costs.draft(1, 9) == pytest.approx(5.5)
    for _ in range(300):
        costs.observe("decoder", 1, 3.0)
    assert costs.draft(1, 1) == pytest.approx(3.0, rel=0.05)
    assert costs.draft(1, 41) > 15, "alike calls do not make it forget what further rows cost"
