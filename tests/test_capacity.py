"""`fastblt size --simulate`: a replica by its costs, the load that it can serve, and the replicas that a load needs."""

import json
import math
import time
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from engine.config import DtypeName, EngineConfig
from engine.memory.caches import plan_caches
from engine.simulation import costs as files
from engine.simulation.costs import PromptCost, ReplicaCosts, RoundCost
from engine.simulation.load import Arrival, Traffic, arrivals
from engine.simulation.replica import saturation_rate, serve, simulated_engine
from server.capacity import curve
from server.capacity.curve import Capacity, LatencyTarget, LoadPoint, Simulated, capacity, latency
from server.cli import OF_SIMULATION, app
from tests.models import our_config
from tests.test_clients import answer, scripted

CONFIG = our_config()
COSTS = ReplicaCosts(
    of={"model": "tiny"}, decoder="blt", rounds=[RoundCost(1, 0.01, 1.0), RoundCost(8, 0.024, 1.0)],
    prompts=[PromptCost(16, 0.016), PromptCost(64, 0.08)], request_seconds=0.005, dtype="float32", prompt_rows=32,
    max_step_rows=64, max_sequences=8, cache_bytes=1 << 23, page_size=16,
)  # fmt: skip
TRAFFIC = Traffic(24, 20, 0.5)
ANY = LatencyTarget(90.0, None, None)
MOST = COSTS.most_requests_per_second(24, 20)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few requests, in this process."""
    monkeypatch.setattr(curve, "BEYOND", 0.6)
    monkeypatch.setattr(curve, "LEAST_REQUESTS", 80)
    monkeypatch.setattr(curve, "usable_processors", lambda: 1)


def served(*arriving: Arrival, costs: ReplicaCosts = COSTS) -> list[tuple[float, float]]:
    return [(round(one.first_byte, 9), round(one.last_byte, 9)) for one in serve(CONFIG, costs, 4.0, arriving)]


# Costs.


def test_costs_are_on_straight_lines_between_what_was_measured_and_beyond() -> None:
    assert [round(COSTS.round(n).seconds, 9) for n in (1, 2, 8, 9)] == [0.01, 0.012, 0.024, 0.026]
    found = [COSTS.rows_seconds(0, rows) for rows in (8, 16, 40, 64, 112)]
    assert found == pytest.approx([0.008, 0.016, 0.048, 0.08, 0.144])
    assert COSTS.rows_seconds(8, 40) == pytest.approx(0.04)


@given(st.lists(st.integers(0, 5000), min_size=2, max_size=6, unique=True))
def test_rows_cost_the_same_however_a_prompt_is_cut(cuts: list[int]) -> None:
    cuts.sort()
    parts = sum(COSTS.rows_seconds(begin, end) for begin, end in zip(cuts, cuts[1:], strict=False))
    assert parts == pytest.approx(COSTS.rows_seconds(cuts[0], cuts[-1]))


@given(st.integers(1, 300), st.floats(1.0, 16.0), st.floats(0.001, 0.1), st.floats(0.001, 0.1))
def test_a_byte_of_more_sequences_never_costs_less_than_measured(
    sequences: int, num_bytes: float, one: float, many: float
) -> None:
    """However few bytes a step has with many sequences."""
    costs = msgspec.structs.replace(COSTS, rounds=[RoundCost(1, one, num_bytes), RoundCost(8, many, 1.0)])
    found = costs.round(sequences)
    least = min(one / num_bytes, many) if sequences < 8 else many
    assert found.byte_seconds >= least * (1 - 1e-9) and 1 - 1e-9 <= found.num_bytes <= num_bytes


def test_more_sequences_than_were_measured_take_longer_for_a_byte() -> None:
    # From 2 to 10 ms a byte, although a step takes less time with 8.
    costs = msgspec.structs.replace(COSTS, rounds=[RoundCost(4, 0.032, 16.0), RoundCost(8, 0.01, 1.0)])
    assert costs.round(16) == RoundCost(16, pytest.approx(0.026), 1.0)
    assert costs.round(1) == RoundCost(1, 0.032, 16.0)
    # They took less by chance.
    costs = msgspec.structs.replace(COSTS, rounds=[RoundCost(4, 0.012, 1.0), RoundCost(8, 0.01, 1.0)])
    assert costs.round(16) == RoundCost(16, pytest.approx(0.01), 1.0)


def test_costs_survive_their_file(tmp_path: Path) -> None:
    files.write(tmp_path / "costs", COSTS)
    assert files.read(tmp_path / "costs") == COSTS


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rounds": []}, "`rounds` must have entries with ascending"),
        ({"rounds": [[8, 1.0, 1.0], [1, 1.0, 1.0]]}, "`rounds` must have entries with ascending"),
        ({"rounds": [[1, 1.0, 0.0]]}, "`rounds` must .* `num_bytes` of at least 1"),
        ({"prompts": []}, "`prompts` must have entries"),
        ({"prompts": [[4, 2.0], [8, 1.0]]}, "`prompts` must have entries"),
        ({"page_size": "large"}, "holds no costs"),
    ],
)
def test_a_file_that_holds_no_costs_is_named_with_what_is_wrong(
    wrong: dict[str, Any], said: str, tmp_path: Path
) -> None:
    names = {"rounds": ("sequences", "seconds", "num_bytes"), "prompts": ("rows", "seconds")}
    for name, value in wrong.items():
        if isinstance(value, list):
            wrong[name] = [dict(zip(names[name], one, strict=True)) for one in value]
    (tmp_path / "costs").write_bytes(msgspec.json.encode(msgspec.to_builtins(COSTS) | wrong))
    with pytest.raises(ValueError, match=f"{tmp_path}/costs.* {said}"):
        files.read(tmp_path / "costs")


# Load.


def test_arrivals_have_the_rate_and_the_lengths_that_were_asked_for() -> None:
    found = arrivals(Traffic(400, 200, 0.5), rate=5.0, count=4000)
    assert found[-1].at == pytest.approx(4000 / 5, rel=0.05)
    for mean, lengths in ((400, [one.prompt_bytes for one in found]), (200, [one.output_bytes for one in found])):
        average = sum(lengths) / len(lengths)
        assert average == pytest.approx(mean, rel=0.05)
        assert math.sqrt(sum((n - average) ** 2 for n in lengths) / len(lengths)) == pytest.approx(mean / 2, rel=0.1)
    assert {one[1:] for one in arrivals(Traffic(400, 200, 0.0), 1.0, 50)} == {(400, 200)}
    half = arrivals(Traffic(400, 200, 0.5), rate=2.5, count=4000)
    assert [one[1:] for one in half] == [one[1:] for one in found] and half[-1].at == pytest.approx(2 * found[-1].at)


# A replica.


def test_a_request_alone_takes_what_its_steps_cost() -> None:
    # 20 rows, then ten bytes of which the first comes with the last row.
    first = 0.005 + COSTS.rows_seconds(0, 20) + 0.01
    assert served(Arrival(0.0, 20, 10)) == [pytest.approx((first, first + 9 * 0.01))]
    assert served(Arrival(3.0, 20, 10)) == served(Arrival(0.0, 20, 10))


def test_a_long_prompt_is_read_in_several_steps() -> None:
    # Of at most 32 rows; only the last has a byte.
    first = 0.005 + COSTS.rows_seconds(0, 80) + 0.01
    assert served(Arrival(0.0, 80, 1)) == [pytest.approx((first, first))]


def test_steps_that_give_several_bytes_do_so_only_while_no_prompt_is_read() -> None:
    costs = msgspec.structs.replace(COSTS, rounds=[RoundCost(1, 0.04, 4.0), RoundCost(8, 0.096, 4.0)])
    alone = 0.005 + COSTS.rows_seconds(0, 16)
    assert served(Arrival(0.0, 16, 8), costs=costs) == [pytest.approx((alone + 0.04, alone + 0.08))]
    # The last step gives two bytes, and takes half as long.
    assert served(Arrival(0.0, 16, 6), costs=costs) == [pytest.approx((alone + 0.04, alone + 0.06))]


@pytest.mark.parametrize(("decoder", "each"), [("blt", 1), ("blt-s", 2), ("blt-dv", 2), ("auto", 2), ("blt-d", 4)])
def test_steps_that_read_a_prompt_give_what_the_decoder_does_beside_one(decoder: str, each: int) -> None:
    costs = msgspec.structs.replace(COSTS, decoder=decoder, rounds=[RoundCost(1, 0.04, 4.0)])
    # The first writes while the second's prompt is read, in three steps; the last of them has a byte of both, or more.
    _, (first, _) = served(Arrival(0.0, 16, 40), Arrival(0.03, 80, 40), costs=costs)
    reading = costs.rows_seconds(0, 80) + 2 * 0.01 * each
    began = 0.005 + costs.rows_seconds(0, 16) + 0.04
    assert first == pytest.approx(began - 0.03 + reading + 0.04)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_simulated_replica_has_the_pages_of_the_real_one(dtype: DtypeName) -> None:
    chosen = EngineConfig("", dtype=dtype, max_sequences=8, max_step_rows=96, cache_bytes=1 << 21, page_size=16)
    plan = plan_caches(CONFIG, chosen)
    costs = msgspec.structs.replace(COSTS, dtype=dtype, max_step_rows=96, cache_bytes=plan.num_bytes)
    engine, _ = simulated_engine(CONFIG, costs, 4.0)
    assert engine.limits.pages == {name: count - 1 for name, count in plan.pages.items()}, "all but the scratch page"


def test_requests_that_come_together_share_steps_and_wait_for_places() -> None:
    together = served(*[Arrival(0.0, 16, 20)] * 8)
    assert max(last for _, last in together) < 8 * served(Arrival(0.0, 16, 20))[0][1] / 2
    twice = served(*[Arrival(0.0, 16, 20)] * 16)
    assert max(last for _, last in twice) == pytest.approx(2 * max(last for _, last in together), rel=0.1)


def test_a_replica_that_is_full_serves_what_it_can_for_long() -> None:
    count = 200
    took = max(last for _, last in served(*[Arrival(0.0, 24, 20)] * count))
    assert count / took == pytest.approx(COSTS.most_requests_per_second(24, 20), rel=0.1)


def test_a_text_that_the_caches_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="a request cannot be served"):
        served(Arrival(0.0, 1 << 20, 1))
    with pytest.raises(ValueError, match="a request cannot be served"):
        saturation_rate(CONFIG, COSTS, 4.0, [Arrival(0.0, 1 << 20, 1)] * 50)


def test_what_a_replica_serves_for_long_is_what_its_costs_allow() -> None:
    asked = arrivals(TRAFFIC, 1.0, 200)
    assert saturation_rate(CONFIG, COSTS, 4.0, asked) == pytest.approx(MOST, rel=0.1)
    with pytest.raises(ValueError, match="26 requests do not tell what 8 places serve: 27 are needed"):
        saturation_rate(CONFIG, COSTS, 4.0, asked[:26])


# The replicas that a load needs.


def simulated(traffic: Traffic = TRAFFIC) -> Simulated:
    return Simulated(CONFIG, COSTS, 4.0, traffic, 90.0, 80)


def test_latency_grows_with_the_load() -> None:
    points = [simulated().at(share, MOST) for share in (0.1, 0.5, 0.95)]
    for part in ("first_byte", "last_byte"):
        for figure in ("mean", "median", "high"):
            found = [getattr(getattr(point, part), figure) for point in points]
            assert found == sorted(found)
    assert points[0].running < points[2].running


def test_the_load_found_is_the_most_that_gives_what_is_wanted() -> None:
    alone = simulated().at(curve.SHARES[0], MOST).last_byte.high
    wanted = LatencyTarget(90.0, None, 1.5 * alone)
    ticks: list[int] = []
    found = capacity(simulated(), wanted, rate=100.0, tell=ticks.append)
    assert ticks == list(range(1, curve.num_loads() + 1))
    assert [point.rate for point in found.points] == sorted(point.rate for point in found.points)
    assert found.best.meets(wanted)
    above = found.points[found.points.index(found.best) + 1]
    assert not above.meets(wanted) and above.rate - found.best.rate < 0.02 * simulated().saturation_rate()
    assert found.replicas == math.ceil(100.0 / found.best.rate)
    assert capacity(simulated(), ANY, 100.0, ticks.append).best.share == curve.SHARES[-1]


def test_no_load_is_found_that_a_replica_falls_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asked for a latency, and rows of prompts are cheap, but only so many of them run in a step."""
    monkeypatch.setattr(curve, "SHARES", curve.SHARES[-1:])
    costs = msgspec.structs.replace(COSTS, prompts=[PromptCost(64, 0.0064)])
    traffic = Traffic(320, 10, 0.2)
    found = capacity(Simulated(CONFIG, costs, 4.0, traffic, 90.0, 120), ANY, 1.0, lambda _: None)
    assert found.best.rate < 0.7 * costs.most_requests_per_second(320, 10)
    asked = arrivals(traffic, found.best.rate, 200)
    ends = [one.at + took.last_byte for one, took in zip(asked, serve(CONFIG, costs, 4.0, asked), strict=True)]
    middle, end = asked[100].at, asked[-1].at
    assert sum(middle < at <= end for at in ends) > 0.8 * 100, "about as many end as come"


def test_a_percentile_has_requests_beyond_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    counted = 1 - curve.BEGINNING - curve.END
    for percentile in (90.0, 99.0, 99.9):
        count = curve.enough_requests(percentile, 64)
        assert count * counted * (1 - percentile / 100) >= 9.99 and count >= 8 * 64
    assert curve.enough_requests(50.0, 8) == 400 and curve.enough_requests(50.0, 256) == 2048


def test_what_no_load_gives_is_said() -> None:
    with pytest.raises(ValueError, match=r"its last byte takes .* s \(p90\), 0.001 s are wanted"):
        capacity(simulated(), LatencyTarget(90.0, 9.0, 0.001), 1.0, lambda _: None)


def test_loads_are_simulated_in_processes_as_here(monkeypatch: pytest.MonkeyPatch) -> None:
    here = [simulated().at(share, MOST) for share in (0.1, 0.5)]
    monkeypatch.setattr(curve, "usable_processors", lambda: 2)
    assert list(curve._all_at(simulated(), (0.1, 0.5), MOST)) == here


def test_loads_under_way_end_with_the_first_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with Ctrl-C. The second would take minutes."""
    monkeypatch.setattr(curve, "usable_processors", lambda: 2)
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        list(curve._all_at(replace(simulated(), num_requests=1_000_000), (0.0, 0.5), MOST))
    assert time.monotonic() - began < 60 and not active_children()


def test_percentiles_are_of_the_requests_themselves() -> None:
    found = latency([4.0, 1.0, 3.0, 2.0], 75)
    assert (found.mean, found.median, found.high) == (2.5, 2.0, 3.0)
    assert latency([1.0], 99.9).high == 1.0


# The command.


def command(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["size", "--config", "tiny", "--simulate", *words])
    return done.exit_code, done.output


@pytest.fixture
def measured(tmp_path: Path) -> str:
    files.write(tmp_path / "costs.json", COSTS)
    return str(tmp_path / "costs.json")


def test_the_command_prints_the_replicas_and_draws(measured: str, tmp_path: Path) -> None:
    asked = ["--costs", measured, "--prompt-bytes", "24", "--output-bytes", "20", "--requests-per-second", "50"]
    code, said = command(*asked, "--last-byte", "2", "--plot", str(tmp_path / "curve.png"))
    assert code == 0, said
    assert (
        "50 requests/s need " in said
        and "each, 99 % of requests get the last byte within 2 s." in said
        and "most" in said
    )
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    code, said = command(*asked, "--json")
    found = json.loads(said)
    assert code == 0 and found["replicas"] == math.ceil(50 / found["best"]["rate"])
    assert found["costs"]["rounds"][0] == {"sequences": 1, "seconds": 0.01, "num_bytes": 1.0}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--simulate needs --url"),
        (["--costs", "/none/costs.json"], "/none/costs.json: No such file"),
        (["--url", "127.0.0.1:8000"], "--url: must be as http://127.0.0.1:8000, not '127.0.0.1:8000'"),
        (["--url", "http://127.0.0.1:9"], "--url: http://127.0.0.1:9/v1/models: "),
        (["--url", "http://127.0.0.1:9", "--costs", "/none/x"], "--costs: /none is no directory"),
        (["--plot", "curve.txt"], "--plot: curve.txt must end with .png"),
    ],
)
def test_the_command_says_what_is_wrong(words: list[str], said: str) -> None:
    code, found = command(*words)
    assert code == 1 and said in found


@pytest.mark.parametrize("body", [b"{}", b'{"data": []}', b'{"data": [{"id": "m"}]}', b'{"data": "m"}'])
def test_another_kind_of_server_is_one_line(body: bytes) -> None:
    with scripted(answer(200, body)) as (url, _):
        code, found = command("--url", url)
    assert code == 1 and found == f"fastblt: --url: {url} is not a fastblt server of this version\n"
    with scripted(answer(200, b"<html>")) as (url, _):
        code, found = command("--url", url)
    assert code == 1 and found == f"fastblt: --url: {url}/v1/models is no JSON object: this is not a fastblt server\n"


def test_the_command_says_whose_costs_a_file_has(measured: str) -> None:
    code, found = command("--costs", measured, "--decoder", "blt-s")
    assert code == 1 and f"--decoder: {measured} has the costs of blt, not of blt-s" in found


def test_help_tells_which_flags_only_a_simulation_takes() -> None:
    size: Any = typer.main.get_command(app).commands["size"]  # type: ignore[attr-defined]
    names = [option.name for option in size.params]
    ours = size.params[names.index("simulate") + 1 : names.index("as_json")]
    assert {option.name for option in ours if not option.help.startswith("--simulate: ")} == {"api_key"}
    assert tuple(option.name for option in ours) == OF_SIMULATION


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--first-byte", "0.1", "--requests-per-second", "50"], "for --requests-per-second: needs --simulate"),
        (["--spread", "0.5", "--training"], "for --spread: needs --simulate"),
        (["--api-key", "k"], "for --api-key: needs --simulate"),
        (["--simulate", "--costs", "x.json", "--training"], "for --training: cannot be combined with --simulate"),
    ],
)
def test_flags_of_a_simulation_go_with_it_alone(words: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["size", "--config", "tiny", *words])
    assert done.exit_code == 2 and said in done.output


def test_a_key_in_the_environment_asks_for_no_simulation() -> None:
    done = CliRunner().invoke(app, ["size", "--config", "tiny"], env={"FASTBLT_API_KEY": "k"})
    assert done.exit_code == 0, done.output


def test_a_capacity_is_told_as_json() -> None:
    point = LoadPoint(1.0, 0.5, latency([1.0], 90), latency([2.0], 90), 1.0)
    assert json.dumps(Capacity([point], point, 1, 1.0).to_json())
