"""Warming up: afterwards steps record nothing new, within a bound of time, and nothing else has changed."""

import logging
from pathlib import Path
from typing import Any

import pytest

from engine import warm_up as warm_up_module
from engine.types import SamplingParams
from engine.warm_up import warm_up
from tests.engines import make_engine, request, run, save_ours
from tests.models import our_config, our_model, text

WAYS: list[dict[str, Any]] = [{}, {"decoder": "blt-s"}, {"decoder": "blt-d"}, {"decoder": "blt-dv"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = our_model(our_config(decoder_input="embedding", mask_id=260, block_size=6), 5)
    return save_ours(tmp_path_factory.mktemp("warm_up") / "model", made)


def test_after_warming_up_requests_record_almost_nothing_new(model: Path) -> None:
    engine = make_engine(model, graphs=True, max_sequences=2)
    recorded = warm_up(engine, 60.0)
    assert recorded == engine.stepper.executor.num_recorded > 50
    for way in WAYS:
        for sampling in (SamplingParams(temperature=0), SamplingParams(temperature=0.7, seed=3)):
            for count in (1, 2):
                run(engine, [request(str(n), text(24, n), 40, sampling=sampling, **way) for n in range(count)])
    # How many patches close in a step, and how drafts end, depends on the text.
    assert engine.stepper.executor.num_recorded - recorded <= 0.05 * recorded


def test_warming_up_leaves_the_engine_as_it_was(model: Path) -> None:
    engine, other = (make_engine(model, graphs=True, max_sequences=2) for _ in range(2))
    warm_up(engine, 60.0)
    assert not engine.has_work and engine.snapshot().steps == 0
    assert all(pool.used == pool.cached == 0 for pool in engine.snapshot().pools.values())
    asked = [request("a", text(30, 1), 20)]
    assert run(engine, asked)["a"].ids == run(other, asked)["a"].ids


def test_warming_up_ends_in_time_and_says_what_is_missing(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(model, graphs=True, max_sequences=64)
    with caplog.at_level(logging.INFO, "fastblt.engine"):
        warm_up(engine, 1e-9)
    assert engine.stepper.executor.num_recorded == 0
    assert "warmed up for 0 of" in caplog.text


def test_warming_up_reports_its_progress(
    model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_up_module, "PROGRESS_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "fastblt.engine"):
        warm_up(make_engine(model, graphs=True, max_sequences=1), 60.0)
    assert "warming up: 1 of 4 batches" in caplog.text and "warmed up in" in caplog.text


def test_an_engine_without_recordings_has_nothing_to_warm_up(model: Path) -> None:
    assert warm_up(make_engine(model), 60.0) == 0
