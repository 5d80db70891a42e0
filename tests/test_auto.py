"""What auto chooses when costs and agreement are known."""

import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.costs.latency import HOST, LatencyModel, Line
from engine.decoders import SharedPrior
from engine.decoders.auto import KEPT_ROUNDS, PROBE_INTERVAL, PROBE_STEPS, AcceptanceRate, Auto
from engine.decoders.blt import Autoregressive
from engine.decoders.blt_d import BlockDiffusion
from engine.decoders.blt_dv import VerifiedDiffusion
from engine.decoders.blt_s import SelfSpeculation
from engine.scheduler import Scheduler
from engine.types import SamplingParams
from tests.engines import make_engine, request, run, save_ours
from tests.models import OUR_MODELS, text
from tests.test_scheduler import Memory, sequence

SEQUENCE: Any = SimpleNamespace(mean_patch=4.0)


def test_a_line_is_fitted_to_costs_and_shared_by_the_rows_of_a_batch() -> None:
    line = Line()
    draw = random.Random(0)
    for _ in range(300):
        rows = draw.randint(1, 40)
        line.observe(rows, 2.0 + 0.25 * rows + draw.uniform(-0.05, 0.05))
    assert line.share(8, 1) == pytest.approx(4.0, abs=0.1)
    assert line.share(8, 10) == pytest.approx(2.2, abs=0.1)


def test_a_fitted_line_follows_changes_of_the_machine() -> None:
    line = Line()
    for seconds in [1.0] * 500 + [3.0] * 500:
        line.observe(4, seconds)
    assert line.share(4, 1) == pytest.approx(3.0, abs=0.01)


def costs(**fixed: tuple[float, float]) -> LatencyModel:
    """Stages that take a + b * rows seconds."""
    found = LatencyModel(drafts_encode=False)
    for stage, (a, b) in fixed.items():
        for rows in (1, 2, 4, 8, 16, 33) * 20:
            found.observe(stage, rows, a + b * rows)
    return found


LARGE_GLOBAL = {"patcher": (0.4, 0.0), "encoder": (0.1, 0.0), "decoder": (1.0, 0.0), "global": (9.0, 0.0)}
COMPUTE_BOUND = {"patcher": (0.0, 0.1), "encoder": (0.0, 0.1), "decoder": (0.0, 1.0), "global": (0.0, 1.0)}


def auto(costs: LatencyModel, drafting: float, diffusion: float, exact: bool = True) -> Auto:
    """One that has seen drafts of both kinds be right so often."""
    experience = SharedPrior()
    found = Auto(8, costs, experience, exact)
    for agreement, rate in ((found.drafts, drafting), (found.blocks, diffusion)):
        agreement.prior = rate
    return found


def choice(made: Auto) -> Any:
    made.choose(SEQUENCE)
    return made.chosen.decoder


def test_auto_drafts_longer_the_more_drafts_are_accepted_when_reading_weights_dominates() -> None:
    good, poor = choice(auto(costs(**LARGE_GLOBAL), 0.99, 0.1)), choice(auto(costs(**LARGE_GLOBAL), 0.9, 0.1))
    assert isinstance(good, SelfSpeculation) and isinstance(poor, SelfSpeculation)
    assert good.draft_length > poor.draft_length
    assert isinstance(choice(auto(costs(**LARGE_GLOBAL), 0.5, 0.8)), VerifiedDiffusion)


def test_auto_does_not_draft_when_rows_dominate_the_cost() -> None:
    assert isinstance(choice(auto(costs(**COMPUTE_BOUND), 0.6, 0.4)), Autoregressive)


def test_auto_counts_the_hosts_part_once_for_a_step_of_several_bytes() -> None:
    found = costs(
        **{
            "patcher": (0.0, 2e-5),
            "encoder": (0.0, 2e-5),
            "decoder": (0.0, 5e-5),
            "global": (0.0, 5e-5),
            HOST: (1e-3, 0.0),
        }
    )
    assert isinstance(choice(auto(found, 0.6, 0.7)), VerifiedDiffusion)
    found.runs_ahead, found.drafting = True, "within"
    assert isinstance(choice(auto(found, 0.6, 0.7)), Autoregressive)
    assert found.next_byte(4.0) == pytest.approx(1.025e-4 + 1e-3 / found.launch_bytes(1), rel=0.01)
    assert found.draft(3, 1) == pytest.approx(1.5e-4, rel=0.01), "its passes are in the step that verifies"


def test_auto_goes_by_the_measured_time_of_steps_of_blt_alone() -> None:
    """Which are faster than their passes would be one by one."""
    found = costs(**LARGE_GLOBAL)
    assert not isinstance(choice(auto(found, 0.97, 0.1)), Autoregressive)
    for sequences in (1, 4) * 20:
        found.observe_bytes(sequences, 0.4 + 0.1 * sequences)
    assert found.next_byte(4.0) == pytest.approx(0.5)
    assert isinstance(choice(auto(found, 0.97, 0.1)), Autoregressive)
    found.num_running = 4
    assert found.next_byte(4.0) == pytest.approx(0.2)


@pytest.mark.parametrize(("drafting", "steps"), [("within", 0), ("before", 1), ("each", 8)])
def test_a_draft_costs_the_host_the_steps_that_it_takes(drafting: Any, steps: int) -> None:
    found = costs(decoder=(1.0, 0.0), **{HOST: (5.0, 0.0)})
    found.drafting = drafting
    assert found.draft(8, 1) == pytest.approx(8.0 + 5.0 * steps)


@pytest.mark.parametrize("sequences", [1, 8])
def test_all_sequences_measure_blt_in_the_same_steps(sequences: int) -> None:
    found = costs(**LARGE_GLOBAL)
    made = [auto(found, 0.97, 0.1) for _ in range(sequences)]
    measured = []
    for step in range(4 * PROBE_INTERVAL):
        kinds = {type(choice(each)) for each in made}
        assert len(kinds) == 1, "a step of several decoders is slow, and measures nothing"
        found.unmeasured += 1
        if kinds == {Autoregressive}:
            found.observe_bytes(sequences, 9.0)
            measured.append(step)
    assert measured == [PROBE_INTERVAL, 2 * PROBE_INTERVAL + 1, 3 * PROBE_INTERVAL + 2]


@pytest.mark.parametrize(
    "fields", [{}, {"sampling": SamplingParams(temperature=0, presence_penalty=0.5)}, {"logprobs": 1}]
)
def test_the_time_of_blt_is_not_taken_from_steps_that_the_host_decides(tmp_path: Path, fields: dict[str, Any]) -> None:
    """They make one byte each, where others make several, or scores, too."""
    engine = make_engine(save_ours(tmp_path / "model", OUR_MODELS["fast-blt"]()))
    run(engine, [request("one", text(20, 3, specials=False), 40, decoder="blt", **fields)])
    assert (engine.ledger.latency.unmeasured < engine.snapshot().steps) == (not fields)


def test_auto_does_not_wait_for_a_measurement_that_others_prevent() -> None:
    found = costs(**LARGE_GLOBAL)
    made, kinds = auto(found, 0.97, 0.1), Counter[type]()
    for _ in range(10 * (PROBE_INTERVAL + PROBE_STEPS)):
        kinds[type(choice(made))] += 1
        found.unmeasured += 1
    assert kinds[Autoregressive] == 10 * PROBE_STEPS


def test_auto_works_out_times_now_and_then_and_when_others_come() -> None:
    asked = []

    class Counted(LatencyModel):
        def next_byte(self, patch: float) -> float:
            asked.append(patch)
            return super().next_byte(patch)

    found = Counted(drafts_encode=False)
    made = auto(found, 0.9, 0.9)
    for _ in range(3 * KEPT_ROUNDS):
        made.choose(SEQUENCE)
    assert len(asked) == 3
    found.num_running = 7
    made.choose(SEQUENCE)
    assert len(asked) == 4


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.97, 1.0])
def test_a_round_commits_its_accepted_drafts_and_a_byte_of_the_model(rate: float) -> None:
    always = AcceptanceRate(rate)
    assert always.committed(8) == pytest.approx(sum(rate**n for n in range(9)))


def test_auto_does_not_draft_for_a_crowd_that_shares_the_weights() -> None:
    mixed = {stage: (a, 0.3) for stage, (a, _) in LARGE_GLOBAL.items()}
    alone, crowded = costs(**mixed), costs(**mixed)
    crowded.num_running = 60
    assert type(choice(auto(alone, 0.97, 0.3))) in (SelfSpeculation, VerifiedDiffusion)
    assert type(choice(auto(crowded, 0.97, 0.3))) is Autoregressive


def test_only_the_first_rejected_byte_of_a_draft_counts_as_checked() -> None:
    """Later bytes were drafted after a wrong byte and say nothing of the model."""
    ended, whole = AcceptanceRate(0.5), AcceptanceRate(0.5)
    ended.observe(8, 3)
    whole.observe(8, 8)
    assert (ended.accepted, ended.checked) == (3, 4)
    assert (whole.accepted, whole.checked) == (8, 8)


@pytest.mark.parametrize("drafted", [2, 8, 32])
def test_the_acceptance_rate_is_per_byte_whatever_the_draft_length(drafted: int) -> None:
    draw, chance, rates = random.Random(drafted), 0.8, []
    agreement = AcceptanceRate(0.5)
    for _ in range(2000):
        accepted = next((n for n in range(drafted) if draw.random() >= chance), drafted)
        agreement.observe(drafted, accepted)
        rates.append(agreement.rate)
    # The prior keeps its part beside what the last ten rounds or so have checked.
    assert 0.65 < sum(rates) / len(rates) < 0.85


def test_auto_tries_an_abandoned_decoder_again() -> None:
    made = auto(costs(**LARGE_GLOBAL), 0.97, 0.1)
    tried = 0
    for _ in range(3 * PROBE_INTERVAL):
        for agreement in (made.drafts, made.blocks):
            agreement.idle += 1
        decoder = choice(made)
        tried += isinstance(decoder, VerifiedDiffusion)
        if isinstance(decoder, SelfSpeculation):
            made.drafts.idle = 0
    assert tried == 3


def test_auto_chooses_block_diffusion_only_when_inexact_text_is_allowed() -> None:
    assert isinstance(choice(auto(costs(**LARGE_GLOBAL), 0.3, 0.2, exact=False)), BlockDiffusion)
    assert not isinstance(choice(auto(costs(**LARGE_GLOBAL), 0.3, 0.2)), BlockDiffusion)


def test_auto_does_not_choose_inside_the_scheduler() -> None:
    class Unasked(LatencyModel):
        def verify(self, rows: int, decoded: int, patch: float) -> float:
            raise AssertionError("asked for a cost")

    decoder = Auto(8, Unasked(drafts_encode=False), SharedPrior(), exact=True)
    memory = Memory(1 << 20)
    scheduler = Scheduler(memory, max_sequences=2, max_step_rows=64)
    asked = sequence(0, 10, 10, decoder=decoder)
    scheduler.add(asked)
    assert [rows.sequence for rows in scheduler.schedule()] == [asked]
    with pytest.raises(AssertionError, match="asked for a cost"):
        asked.choose()
