"""The benchmark programs at toy size: they run, leave what they should, and the page shows it."""

import gc
import json
import shlex
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest

from benchmarks import (
    checkouts,
    constraints,
    decoders,
    generate,
    growth,
    prefill_budget,
    program,
    realisation,
    routing,
    short,
    summary,
)
from benchmarks.grammars import GRAMMARS
from benchmarks.models import Form, described, shaped
from benchmarks.paired import in_turn, shown, spread
from benchmarks.program import Verdict
from engine.checkpoint import PRESETS
from engine.config import BYTE_OFFSET
from engine.engine import Engine
from engine.grammars import Constraint, compiled
from engine.types import Delta, Event, Request
from tests.engines import make_engine

TOYS = {
    "against_hf": "--lengths 4 8 --turns 1",
    "against_tokens": "--bytes 70 --turns 1 --ways 'blt-s k=8' --formats q8_0 --num-threads 1",
    "realisation": "--bytes 60 --turns 1 --ways 'blt-s k=8' 'blt-dv B=8'",
    "rates": "--concurrency 1 3 --bytes 80 --turns 1",
    "running_ahead": "--concurrency 1 --bytes 16 --turns 1",
    "decoders": "--bytes 80 --turns 1 --prompts 1 --ways 'BLT-S k=4'",
    "batching": "--concurrency 4 --seconds 0.05 --turns 1",
    "serving": "--concurrency 2 --bytes 8 --turns 1 --num-threads 1",
    "checkouts": "--against . --concurrency 1 --bytes 8 --turns 2 --starts 1 --num-threads 1",
    "growth": "--lengths 60 120 --bytes 12 --hf-most 60 --turns 1",
    "startup": "--turns 1",
    "prefix": "--requests 3 --prefix-bytes 200 --bytes 4 --turns 1",
    "prefill_budget": "--budgets 32 128 --prompt-bytes 200 --streams 2 --steps 4 --turns 1",
    "constraints": "--prompts 1 --bytes 24",
    "fleet": "--replicas 4 --seconds 4 --rates 2 3",
    "routing": "--replicas 2 --rate 2 --seconds 3 --turns 1",
    "capacity": "--shares 0.3 --seconds 2 --prompt-bytes 40 --output-bytes 20 --num-threads 1",
}
HEADERS = {
    "against_hf": "| new bytes | as fast as transformers |",
    "against_tokens": "| times llama.cpp's q8_0 | predicted by bytes read |",
    "realisation": "| blt-dv B=8 | replayed acceptance |",
    "rates": "| at a time | decoder | bytes per second | of blt alone |",
    "running_ahead": "| ahead | decoder | at a time | times never |",
    "decoders": "| speed-up over BLT | code | prose | random |",
    "batching": "| at a time | times the bytes per second of one | of linear |",
    "serving": "| streams at a time | HTTP of the engine's bytes per second |",
    "checkouts": "| decoder | streams at a time | bytes/s over those of",
    "growth": "| context, bytes | ours, ms per byte |",
    "startup": "| to the first byte, s |",
    "prefix": "| 3 | 200 bytes |",
    "prefill_budget": "| max_step_rows | first byte of the prompt, steps |",
    "fleet": "| replicas | requests a second for each | rule |",
    "routing": "| rule | mean, s | p90, s | first byte, s | cached |",
    "capacity": "| decoder | load | requests/s | to the | mean, s | simulated |",
    "constraints": "| grammar | texts | cut | bytes | blt | blt-s k=8 | blt-dv B=8 |",
}
NO_MODEL = {"fleet"}
PROMPT = b"        num_patches = ca"
PICTURES = set(TOYS) - {"decoders", "startup", "constraints"}


Content = dict[str, Any]


def run(name: str, arguments: str, work: Path, out: Path) -> Content:
    model = [] if name in NO_MODEL else ["--shape", "tiny", "--work", str(work)]
    import_module(f"benchmarks.{name}").main([*model, *shlex.split(arguments), "--out", str(out)])
    (path,) = out.glob(f"{name}-*.json")
    content: Content = json.loads(path.read_text())
    return content


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Content, Path]]:
    """What a program leaves, and where; each is run once."""
    out, work = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("work")
    return cache(lambda name: (run(name, TOYS[name], work, out), out))


def test_every_benchmark_has_toy_arguments() -> None:
    assert set(summary.PROGRAMS) == set(TOYS) == set(HEADERS)
    assert {run.split()[0] for run in short.RUNS} <= set(TOYS)


SLOW = ("checkouts", "startup", "routing", "capacity")
"""Benchmarks that start several servers."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in TOYS])
def test_a_benchmark_writes_figures_a_table_and_a_plot(name: str, toys: Callable[[str], tuple[Content, Path]]) -> None:
    if lacks := program.lacking(name):
        pytest.skip(lacks)
    content, out = toys(name)
    label, said, model = (
        ("4", "4 simulated replicas", "") if name in NO_MODEL else ("tiny-shape", "tiny shape", "--shape tiny ")
    )
    assert content["program"] == name and content["subject"]["model"] == said
    assert content["command"] == f"python -m benchmarks.{name} {model}{TOYS[name]}"
    assert content["taken"]["cores"] and content["taken"]["torch"]
    assert ("random weights" in content["subject"]["notes"]) == bool(model)
    picture = out / f"{name}-{label}.png"
    assert picture.exists() == (name in PICTURES)
    assert not picture.exists() or picture.read_bytes().startswith(b"\x89PNG")
    page = summary.write(out).read_text()
    verdicts = summary.verdicts(content)
    assert verdicts and all(f"| {verdict.figure} | {said} |" in page for verdict in verdicts)
    assert HEADERS[name] in page and f"`{content['command']}`" in page
    assert (f"({picture.name})" in page) == (name in PICTURES)


def test_replayed_acceptance_is_labelled_and_can_be_left_out(tmp_path: Path) -> None:
    arguments = "--bytes 60 --turns 1 --ways 'blt-s k=8'"
    replayed = run("realisation", arguments, tmp_path, tmp_path)
    page = summary.write(tmp_path).read_text()
    assert "replayed acceptance" in replayed["subject"]["notes"] and "realisation (replayed acceptance)" in page
    own = run("realisation", f"{arguments} --no-replay-acceptance", tmp_path, tmp_path)
    assert "replayed" not in summary.write(tmp_path).read_text()
    assert [content["rows"][1]["acceptance"] for content in (replayed, own)] == ["replayed acceptance", "the model's"]


def test_verdicts_state_whether_benchmark_aims_are_met(toys: Callable[[str], tuple[Content, Path]]) -> None:
    content = deepcopy(toys("serving")[0])
    for median, met in ((0.96, True), (0.94, False)):
        content["rows"][0]["of_engine"] = {"median": median, "least": median, "most": median}
        assert [verdict.met for verdict in summary.verdicts(content)] == [met]
    content = deepcopy(toys("running_ahead")[0])
    for median, met in ((0.971, True), (0.969, False)):
        for row in content["rows"]:
            row["over_never"] = {"median": median, "least": median, "most": median}
        verdict = summary.verdicts(content)[-1]
        assert (verdict.aim, verdict.met) == ("at least 0.97 of never's bytes/s", met)
    content = deepcopy(toys("realisation")[0])
    assert {verdict.met for verdict in summary.verdicts(content)} == {None}, "the aims are the 1B shape's"
    content["subject"]["model"] = "1b shape"
    for row in content["rows"]:
        row.update(realisation=0.95, bandwidth_use=0.7, arithmetic_use=0.81, host_cost=0.04)
    assert [verdict.met for verdict in summary.verdicts(content)] == [True, False, True, True]
    assert "0.70 | 0.81 | 0.81 of arithmetic" in realisation.render(content)
    content["rows"][1].update(bandwidth_use=0.79, arithmetic_use=0.5)
    assert [verdict.met for verdict in summary.verdicts(content)] == [True, False, True, False], "the least one counts"
    for row in content["rows"]:
        del row["arithmetic_use"]
    assert [verdict.met for verdict in summary.verdicts(content)] == [True, False, True], "an older recording"
    assert "| 0.70 |  |  |" in realisation.render(content)
    content = deepcopy(toys("against_hf")[0])
    for (length, ratio), row in zip(((64, 9.0), (256, 21.0)), content["rows"], strict=True):
        row.update(length=length, ratio={"median": ratio, "least": ratio, "most": ratio})
    assert [verdict.met for verdict in summary.verdicts(content)] == [True]
    content["rows"][0]["ratio"]["median"] = 22.0
    assert [verdict.met for verdict in summary.verdicts(content)] == [False], "the ratio must grow"


class Paced:
    """An engine whose steps take a second each and give so many bytes, one request after the other."""

    def __init__(self, steps: dict[str, Sequence[int]]) -> None:
        """steps: of each decoder."""
        self.now = 0.0
        self._steps = steps
        self._left: list[Delta] = []

    @property
    def has_work(self) -> bool:
        return bool(self._left)

    def add(self, request: Request) -> None:
        self._left += [Delta(id=request.id, ids=[5] * count) for count in self._steps[request.decoder]]

    def step(self) -> list[Delta]:
        self.now += 1.0
        return [self._left.pop(0)]

    def perf_counter(self) -> float:
        return self.now


def test_the_lower_bound_of_a_median_counts_starts_and_not_their_turns() -> None:
    assert checkouts.lower_bound([[1.0] * 3] * 2) == 1.0
    # Of five starts three or more are the slow one in 5.8 % of all draws, however many turns they have.
    assert checkouts.lower_bound([[0.8] * 10, *[[1.0] * 10] * 4]) == 0.8
    # Of six starts four or more in 0.9 %, three in 5.4 %: then the median is between both.
    assert checkouts.lower_bound([[0.8] * 10, *[[1.0] * 10] * 5]) == 0.9
    # Of one start: of the five turns three or more are the slow one in 5.8 %.
    assert checkouts.lower_bound([[0.8, 1.0, 1.0, 1.0, 1.0]]) == 0.8


def test_a_row_of_checkouts_keeps_the_ratios_of_each_start() -> None:
    def pair(old: float, new: float) -> checkouts.Pair:
        return {"bytes_per_second": old, "first": 1.0}, {"bytes_per_second": new, "first": 2.0}

    found = checkouts.row("blt", 8, [[pair(10, 9), pair(10, 11)], [pair(10, 10), pair(10, 12)]])
    assert found["ratios"] == [[0.9, 1.1], [1.0, 1.2]]
    assert found["speed"]["median"] == pytest.approx(1.05) and found["first_byte"]["median"] == 2.0
    assert 0.9 <= found["speed"]["lower"] < 1.05


def test_the_bytes_of_a_first_step_are_no_speed_of_a_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """They come with the prompt, before the clock starts, and a decoder of blocks has more of them."""
    engine: Any = Paced({"blt": [1, 4, 4], "blt-d": [8, 4, 4]})
    monkeypatch.setattr(decoders, "time", engine)
    options = Namespace(concurrency=1, temperature=0.0, bytes=99)
    rates = [decoders._run(engine, [[1]], {"decoder": name}, options)[0] for name in ("blt", "blt-d")]
    assert rates == [4.0, 4.0]
    engine = Paced({"blt": [16]})
    with pytest.raises(RuntimeError, match="--bytes must be larger"):
        decoders._run(engine, [[1]], {"decoder": "blt"}, options)


def test_growth_counts_nothing_of_the_prompt_and_sees_every_byte(tiny: Path) -> None:
    engine = make_engine(tiny, run_ahead="always")
    (prompt,) = generate.prompts(1, 40)
    with generate.running_ahead(engine, "never"):
        steps, ids, before, after = growth._ours(engine, prompt, 20)
    assert [step.num_bytes for step in steps] == [1] * 20 and len(ids) == 21
    assert after.calls["encoder"] - before.calls["encoder"] == 20 and after.prompt_rows == before.prompt_rows
    ahead, same, *_ = growth._ours(engine, prompt, 20)
    assert same == ids and len(ahead) < 20, "the policy is the engine's own again"


@pytest.mark.parametrize("name", ["serving", "running_ahead"])
def test_an_engine_is_measured_as_it_is_served(
    name: str, tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Calibrated, and with its garbage frozen: a server's engine is, and would else look as fast as one that is not."""
    module, calibrated = import_module(f"benchmarks.{name}"), list[Engine]()
    monkeypatch.setattr(Engine, "calibrate", lambda engine: calibrated.append(engine))

    class Measured(Exception):
        pass

    def measure(engine: Engine, *_: object) -> None:
        assert calibrated == [engine] and gc.get_freeze_count()
        raise Measured

    monkeypatch.setattr(module, "server", lambda *_: nullcontext(""), raising=False)
    monkeypatch.setattr(module, {"serving": "measure", "running_ahead": "generate"}[name], measure)
    with pytest.raises(Measured):
        module.main(["--model", str(tiny), "--out", str(tmp_path)])
    assert not gc.get_freeze_count()


def test_an_undisturbed_step_has_one_byte_of_each_stream(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(tiny, run_ahead="always")
    asked: dict[str, Any] = {"max_tokens": 200, "ignore_eos": True}
    running = [Request(id=str(i), prompt_ids=text, **asked) for i, text in enumerate(generate.prompts(2, 20))]
    generate.begin(engine, running)
    events: list[Event] = []
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: events.extend(step()))
    assert prefill_budget._unit(engine, 5) > 0
    assert [len(event.ids) for event in events if isinstance(event, Delta)] == [1] * 10
    assert engine.stepper.ahead.policy == "always"


def test_the_figure_of_routing_says_that_lengths_were_known() -> None:
    figures = {"mean": 1.0, "p90": 2.0, "first_byte": 0.5, "cached": 0.1}
    content: Content = {"replicas": 2, "rate": 3.0, "rows": [dict.fromkeys(routing.RULES, figures)]}
    assert "knew the length of every output" in routing.render(content)
    assert "lengths known" in routing.judge(content)[0].found


def test_wrong_constrained_texts_are_named(toys: Callable[[str], tuple[Content, Path]]) -> None:
    content = deepcopy(toys("constraints")[0])
    assert [verdict.met for verdict in summary.verdicts(content)] == [True, True]
    content["wrong"] = 1
    for row in content["rows"]:
        row["calls"] = row["calls_without"]
    assert [verdict.met for verdict in summary.verdicts(content)] == [False, False]
    right, wrong = constraints.Answer(b"[null]", "stop", 3), constraints.Answer(b"(1", "stop", 3)
    found = {"0, greedy": right, "0, sampled": wrong, "1, sampled": wrong._replace(reason="length")}
    wanted = found | {"0, greedy": wrong}
    said = list(constraints.faults("blt, a sum", [b"x", b"y"], GRAMMARS["Lark, a sum"], wanted, found))
    assert said == [
        "blt, a sum, prompt 0, greedy, b'x': b'[null]': not blt's b'(1', which ended with 'stop'",
        "blt, a sum, prompt 0, sampled, b'x': b'(1': another library finds no match",
    ]


@pytest.mark.parametrize(
    ("name", "whole", "beginning", "wrong"),
    [
        ("any JSON object", '{"a":[-1.5e3,"é\\u0009"]}', '{"a":[-1.', '{"a":01'),
        ("JSON, a tree", '{"left":null,"right":null,"value":-9}', '{"left":{"', '{"left":{,'),
        ("JSON, an array of colours", '["青","grün"]', '["grü', '["grün";'),
        ("regex, Cyrillic", "Дам, нет…", "Дам —", "Д!"),
        ("Lark, a sum", "(1+(20-3))-0", "(1+(2", "(1+(02"),
        ("Lark, settings", "[настройки]\nhöhe = «x»\n¶", "[настройки]\nä = вк", "[\n"),
    ],
)
def test_texts_of_benchmark_grammars_are_checked(name: str, whole: str, beginning: str, wrong: str) -> None:
    grammar = GRAMMARS[name]
    assert grammar.fault(whole.encode(), is_whole=True) is None
    assert grammar.fault(beginning.encode(), is_whole=False) is None
    assert grammar.fault(beginning.encode(), is_whole=True)
    assert grammar.fault(wrong.encode(), is_whole=False)
    constraint = Constraint(compiled(grammar.text), 261)
    for byte in whole.encode():
        constraint.advance(byte + BYTE_OFFSET)
    assert constraint.may_end


def test_json_of_another_schema_is_no_match() -> None:
    assert GRAMMARS["JSON, a person"].fault(b'{"name":"A","age":131,"email_is_verified":true}', is_whole=True)
    assert GRAMMARS["any JSON object"].fault(b"[]", is_whole=True)


def test_a_benchmark_that_fails_does_not_stop_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    toy = f"prefix --shape tiny --num-threads 1 {TOYS['prefix']}"
    assert short.run_all(["nothing", toy], tmp_path) == 1
    said = capfd.readouterr()
    assert "[2/2," in said.out and "broke:" in said.err and "No module named" in said.err
    assert "| 3 | 200 bytes |" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
def test_a_benchmark_that_takes_too_long_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(short, "LIMIT_SECONDS", 0.1)
    assert short.run_all(["startup --shape tiny --turns 99"], tmp_path) == 1
    assert "broke: stopped after 0.1 s" in capfd.readouterr().err


def test_the_short_set_of_benchmarks_can_be_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert short.main(["--list", "--only", "batching"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith("python -m benchmarks.batching") for line in lines)


def test_recorded_benchmark_commands_leave_out_folders() -> None:
    given = ["--shape", "1b", "--work", "w", "--ways", "blt-s k=8", "--out", "o"]
    assert program.command("x", given) == "python -m benchmarks.x --shape 1b --ways 'blt-s k=8'"


def test_the_description_of_a_benchmark_model_names_shrunk_parts() -> None:
    assert "hash tables of 10,007 rows instead of 500,002" in described("1b", "fast")
    assert not any("hash" in note for note in described("nano", "fast"))
    for form in get_args(Form):
        config = shaped("1b", form)
        assert config.decoder == PRESETS["1b"].decoder and config.hashes.rows == 10_007
        assert (config.block_size == 8) == (form == "fast")
    assert shaped("nano", "hf").patching.max_patch_length is None


def test_benchmark_prompts_never_change() -> None:
    """Figures of different commits compare only as long as they do."""
    (prompt,) = generate.prompts(1, 24)
    assert bytes(i - BYTE_OFFSET for i in prompt[1:]) == PROMPT


def test_benchmarks_in_turn_alternate() -> None:
    seen: list[str] = []
    pairs = in_turn(lambda: seen.append("A"), lambda: seen.append("B"), 3)
    assert seen == ["A", "B"] * 3 and len(pairs) == 3
    assert shown(spread([3.0, 1.0, 2.0])) == "2.00 (1.00 to 3.00)" and shown(spread([18.04]), ".1f") == "18.0"
    assert Verdict("f", "", "x", None).met is None
