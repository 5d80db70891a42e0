"""The GPU check without a GPU: parts that run, break, find something wrong, are cut and go on; all at toy size."""

import ast
import dataclasses
import json
import os
import random
import re
import shlex
import subprocess
import sys
import tomllib
import weakref
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import replay, variants
from benchmarks.generate import generate, prompts
from benchmarks.gpu_check import (
    ahead,
    check,
    exactness,
    forms,
    host,
    kernel_tests,
    nano,
    probe,
    profiling,
    shape_1b,
)
from benchmarks.gpu_check.__main__ import main
from benchmarks.gpu_check.check import FAILED, MISSING, PARTS, PASSED, Check, Part
from benchmarks.gpu_check.device import data_sheet_gb_s
from benchmarks.gpu_check.piece import Piece
from benchmarks.gpu_check.render import render
from benchmarks.gpu_check.setting import Setting
from benchmarks.models import random_model
from benchmarks.report import ROOT
from engine.decoders import Committed
from kernels import native
from tests.test_training_stages import TORCHS

FAKES = {
    "good": "piece.row('rows', {'device': setting.device, 'quick': setting.quick})",
    "wrong": "piece.fail('two and two are five')",
    "broken": "piece.put(before=1)\n    raise RuntimeError('no such kernel')",
    "endless": "piece.put(before=1)\n    import time; time.sleep(60)",
    "slow": "import time\n    for i in range(60):\n        piece.row('rows', {'i': i}); time.sleep(0.5)",
}
Figures = dict[str, Any]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting("cpu", quick=True, work=tmp_path_factory.mktemp("work"))


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of parts that can be imported: none of them imports torch. Each notes that it ran."""
    for name, body in FAKES.items():
        note = f"open({str(tmp_path / 'ran')!r}, 'a').write('{name} ')"
        (tmp_path / f"fake_{name}.py").write_text(f"def measure(setting, piece):\n    {note}\n    {body}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    # What parts import is for the sources' authors to change while this test runs.
    monkeypatch.setattr(check, "fingerprint", lambda: "now")
    return tmp_path


def checking(folder: Path, limits: dict[str, float] | None = None, **choices: Any) -> Check:
    parts = {
        name: Part(f"fake_{name}", (limits or {}).get(name, 30), gate=name in ("good", "wrong", "broken"))
        for name in FAKES
    }
    return Check(folder / "out", "cpu", "Some Device (TM) 9", "make gpu-check", quick=True, parts=parts, **choices)


def ran(folder: Path) -> list[str]:
    found = (folder / "ran").read_text().split() if (folder / "ran").exists() else []
    (folder / "ran").unlink(missing_ok=True)
    return found


def test_failures_and_errors_of_parts_are_written_and_the_other_parts_run(fakes: Path) -> None:
    checked = checking(fakes, {"endless": 1.5})
    assert checked.run(["wrong", "broken", "endless", "good"], [], 100) == FAILED
    assert checked.path.name == "gpu_check-some-device-tm-9-quick.json"
    content = json.loads(checked.path.read_text())
    parts = content["parts"]
    assert list(parts) == ["good", "wrong", "broken", "endless"], "in the order of the list"
    assert {name: part["status"] for name, part in parts.items()} == {
        "good": "passed", "wrong": "failed", "broken": "broke", "endless": "broke"
    }  # fmt: skip
    assert parts["good"]["figures"] == {"rows": [{"device": "cpu", "quick": True}]}
    assert parts["wrong"]["failures"] == ["two and two are five"]
    assert "no such kernel" in parts["broken"]["last_lines"][-1] and parts["broken"]["figures"] == {"before": 1}
    assert "stopped after 2 s" in parts["endless"]["last_lines"][-1] and parts["endless"]["figures"] == {"before": 1}
    assert content["taken"]["torch"] == torch.__version__
    told = checked.path.with_suffix(".md").read_text()
    assert "two and two are five" in told and "no such kernel" in told and "| endless | broke |" in told


def test_a_gpu_check_resumes_with_the_missing_parts(fakes: Path) -> None:
    checked = checking(fakes)
    assert checked.run(["good"], [], 5) == MISSING, "too little time to begin"
    assert ran(fakes) == []
    assert checked.run(["good", "wrong"], [], 100) == FAILED
    assert ran(fakes) == ["good", "wrong"]
    assert checked.run(["good"], [], 100) == PASSED
    assert ran(fakes) == []
    assert checked.run(["good", "wrong", "broken"], ["good"], 100) == FAILED
    assert ran(fakes) == ["good", "broken"]
    assert checked.run(["good", "broken"], [], 100) == FAILED
    assert ran(fakes) == ["broken"], "what broke is tried again"


def test_figures_of_other_sources_are_measured_again_or_marked(fakes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = checking(fakes)
    checked.run(["good"], [], 100)
    monkeypatch.setattr(check, "fingerprint", lambda: "later")
    ran(fakes)
    assert checking(fakes, keep=True).run(["good"], [], 100) == PASSED
    assert ran(fakes) == []
    assert "| good | passed (of other sources) |" in checked.path.with_suffix(".md").read_text()
    checked.run(["good"], [], 100)
    assert ran(fakes) == ["good"]
    assert "other sources" not in checked.path.with_suffix(".md").read_text()


def test_a_part_cut_by_the_total_time_limit_counts_as_missing(fakes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "LEAST_SECONDS", 1)
    checked = checking(fakes)
    assert checked.run(["endless", "good"], [], 1.5) == MISSING
    parts = json.loads(checked.path.read_text())["parts"]
    assert parts["endless"]["status"] == "cut" and parts["endless"]["figures"] == {"before": 1} and "good" not in parts


def test_a_gpu_check_cut_by_its_budget_leaves_a_report_and_can_be_resumed(
    fakes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first part had its time, the second is cut with rows, the others are not begun; then what is missing runs."""
    monkeypatch.setattr(check, "LEAST_SECONDS", 1)
    every = ["good", "slow", "wrong"]
    written: list[list[str]] = []
    write = Check._write

    def noting(self: Check, pieces: Figures, sources: str) -> None:
        write(self, pieces, sources)
        written.append(re.findall(r"^## (\w+)$", self.path.with_suffix(".md").read_text(), re.M))

    monkeypatch.setattr(Check, "_write", noting)
    checked = checking(fakes)
    assert checked.run(every, [], 3) == MISSING
    assert ran(fakes) == ["good", "slow"]
    assert written[:2] == [["good"], ["good", "slow"]], "the report is written after every part"
    content = json.loads(checked.path.read_text())["parts"]
    assert content["good"]["status"] == "passed" and content["slow"]["status"] == "cut" and "wrong" not in content
    assert content["slow"]["figures"]["rows"][0] == {"i": 0} and len(content["slow"]["figures"]["rows"]) < 60
    report = checked.path.with_suffix(".md").read_text()
    assert "| slow | cut |" in report and "| wrong | not run |" in report
    assert "wrong: not begun, the time is up; the same command goes on here" in capsys.readouterr().out
    # The same command: nothing that was done is done again. The part that was slow is quick this time.
    slow = fakes / "fake_slow.py"
    slow.write_text(slow.read_text().replace("range(60)", "range(1)"))
    assert checked.run(every, [], 100) == FAILED
    assert ran(fakes) == ["slow", "wrong"]


def test_decisions_from_figures_are_printed(fakes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (fakes / "fake_good.py").write_text(
        "def measure(setting, piece):\n    piece.put(decided={'T0, is it so': 'it is.'})\n"
    )
    checking(fakes).run(["good"], [], 100)
    assert "    T0, is it so: it is." in capsys.readouterr().out


def test_the_report_names_card_torch_triton_and_driver(fakes: Path) -> None:
    checked = checking(fakes, driver="580.1")
    checked.run(["good"], [], 100)
    head = checked.path.with_suffix(".md").read_text()[:900]
    assert "Some Device (TM) 9" in head and "driver 580.1" in head and f"torch {torch.__version__}" in head
    assert "triton" in head


def test_the_fingerprint_is_a_hash_of_the_sources() -> None:
    assert check.fingerprint() == check.fingerprint()
    assert re.fullmatch("[0-9a-f]{12}", check.fingerprint())
    assert all((ROOT / source).exists() for source in check.SOURCES)


def imported(path: Path) -> Iterator[list[str]]:
    """The names that a file imports, each in its parts."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            yield from ([*base.split("."), alias.name] for alias in node.names)


def test_the_gpu_check_imports_only_documented_packages() -> None:
    """Other benchmarks plot and serve; what they share with the check does not."""
    shared = [ROOT / "benchmarks" / f"{name}.py" for name in check.SHARED]
    for path in [*shared, *(ROOT / "benchmarks" / "gpu_check").glob("*.py")]:
        for package, *rest in imported(path):
            assert (
                package in {"engine", "kernels", "benchmarks", "torch", "triton", "pytest"} | sys.stdlib_module_names
            ), path
            assert package != "benchmarks" or rest[0] in {*check.SHARED, "gpu_check"}, path


def test_the_gpu_check_without_a_cuda_device_suggests_device_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu_check"])
    assert main() == 1
    said = capsys.readouterr().err
    assert "CUDA" in said and "--device cpu" in said


# The parts themselves.


def figures_of(part: Any, setting: Setting) -> Figures:
    path = setting.work / "piece.json"
    part.measure(setting, Piece(path))
    content = json.loads(path.read_text())
    assert content["failures"] == []
    figures: Figures = content["figures"]
    return figures


def told(part: str, figures: Figures) -> str:
    piece = {"status": "passed", "seconds": 1.0, "failures": [], "figures": figures, "sources": "", "last_lines": []}
    content = {"device": "d", "quick": True, "sources": "", "command": "c", "taken": {}, "parts": {part: piece}}
    return render(content, [])


def test_the_probe_part_measures_bandwidth_and_products(setting: Setting) -> None:
    figures = figures_of(probe, setting)
    assert figures["peak_gb_s"] >= figures["copy_gb_s"] > 0
    assert figures["products"][0]["torch bf16"] > 0
    assert "| toy | 256 x 128 | 1 |" in told("probe", figures)
    assert f"native planner {native.LIBRARY is not None}" in told("probe", figures)


@pytest.mark.slow
def test_the_exactness_part_compares_texts_of_all_decoders_and_models(setting: Setting) -> None:
    rows = figures_of(exactness, setting)["texts"]
    ways = {model: {row["decoder"] for row in rows if row["model"] == model} for model in ("tiny, random", "nano")}
    assert ways == dict.fromkeys(ways, set(exactness.WAYS))
    # No [MASK] in released weights: it only drafts.
    assert {row["decoder"] for row in rows if "released" in row["model"]} == {"blt", "blt-s"}
    assert len(rows) == 2 * (4 + 2 + 4)
    assert "| nano | float32 | blt-s | 2 | 0% | 0% | 0% |" in told("exactness", {"texts": rows})


def test_the_exactness_part_finds_texts_that_differ(setting: Setting) -> None:
    texts = {"blt": [[1, 2], [3]], "blt-s": [[1, 2], [4]], "blt-d": [[9], [9]]}
    found = {"triton, graphs": texts, "triton, at once": {**texts, "blt": [[1, 2], [5]]}, "torch, at once": texts}
    rows = {row["decoder"]: row for row in exactness.compare(found)}
    assert rows["blt-s"]["from blt"] == {"triton, graphs": 0.5, "triton, at once": 0.5, "torch, at once": 0.5}
    assert rows["blt"]["from the first"] == {"triton, at once": 0.5, "torch, at once": 0.0}
    piece = Piece(setting.work / "differ.json")
    for row in rows.values():
        exactness.judge("m", row, piece)
    failures = json.loads((setting.work / "differ.json").read_text())["failures"]
    assert len(failures) == 3 and sum("at once and triton, graphs" in failure for failure in failures) == 1
    assert not any("blt-d" in failure or "torch" in failure for failure in failures)


def test_the_nano_part_measures_speed_with_and_without_graphs(setting: Setting) -> None:
    rows = figures_of(nano, setting)["speed"]
    assert [row["graphs"] for row in rows] == [True] * len(nano.WAYS) + [False] * len(nano.WAYS)
    assert all(row["bytes_per_second"] > 0 for row in rows)
    assert told("nano", {"speed": rows}).count("| blt-dv B=8 |") == 2


@pytest.mark.slow
def test_the_1b_parts_measure_speed_with_replayed_acceptance(setting: Setting) -> None:
    figures = figures_of(shape_1b, setting)
    few = [way for way in variants.RANDOM["fast"] if way != "blt-s k=16"]
    numbers = [(1, way) for way in variants.RANDOM["fast"]] + [(n, way) for n in (2, 3) for way in few]
    assert [(row["concurrency"], row["decoder"]) for row in figures["speed"]] == numbers
    assert all(row["bytes_per_second"] > 0 and min(row["call_us"].values()) > 0 for row in figures["speed"])
    predicted = {(row["concurrency"], row["decoder"]): row["bytes_per_second"] for row in figures["model"]}
    assert set(predicted) == {(n, way) for n in (1, 2, 3) for way in few} and min(predicted.values()) > 0
    assert all(f"| {n} | {way} | " in told("1b", figures) for n, way in numbers)
    figures["speed"] = [row for row in figures["speed"] if row["concurrency"] == 1]
    assert all(0 <= row["host_gap"] <= 1 and row["host_us_per_byte"] >= 0 for row in figures["speed"])
    others = figures_of(forms, setting)
    rows = {(row["form"], row["weights"], row["decoder"]): row for row in figures["speed"] + others["speed"]}
    assert len(rows) == 2 * sum(map(len, variants.RANDOM.values()))
    for (_, _, way), row in rows.items():
        assert row["realisation"] > 0 and row["acceptance"] == (
            "none needed" if way == "blt" else "replayed acceptance"
        )
    drafted = rows["fast", "bfloat16", "blt-s k=8"]
    assert drafted["bytes_per_round"] > 2, "more than random weights would accept"
    assert "replayed acceptance" in told("1b", figures) and "hash tables of 251 rows" in told("1b", figures)


def test_the_host_part_ranks_decoders_by_exposed_time(setting: Setting) -> None:
    found = figures_of(host, setting)
    assert [(row["concurrency"], row["decoder"]) for row in found["host"]] == [
        (n, w) for n in (1, 2) for w in host.WAYS
    ]
    assert all(row["launches_per_byte"] > 0 and row["bytes_per_step"] > 0 for row in found["host"])
    said = told("host", {"host": [{**row, "host_gap": n / 10} for n, row in enumerate(found["host"])]})
    lines = [line for line in said.splitlines() if line.startswith(("| 1 |", "| 2 |"))]
    assert lines[0].startswith(f"| 2 | {list(host.WAYS)[-1]} | {(len(lines) - 1) / 10:.1%} |")


def test_the_1b_part_shows_predictions_and_aims_beside_what_it_measured() -> None:
    row = {
        "form": "fast", "weights": "bfloat16", "concurrency": 1, "decoder": "blt", "acceptance": "none needed",
        "over_blt": 1.0, "range": [1.0, 1.0], "predicted": 1.0, "realisation": 1.0, "read_gb_s": 1e3,
        "bytes_per_second": 950.0, "bandwidth_use": 0.3, "read_mb_per_byte": 1450.0, "bytes_per_round": 1.0,
        "decoder_calls_per_byte": 1.0, "global_calls_per_byte": 0.35, "ms_per_step": 1.0,
        "call_us": {"patcher + encoder": 190.0, "global call": 900.0, "decoder pass": 180.0},
    }  # fmt: skip
    model = {"concurrency": 1, "decoder": "blt", "bytes_per_second": 977.0, "local_us": 222.0, "global_us": 1078.0}
    aims = {"patcher + encoder": 200.0, "global call": 870.0, "decoder pass": 185.0}
    figures = {"speed": [row, {**row, "concurrency": 16}], "model": [{**model, "pass_us": 228.0}], "aim_us": aims}
    said = told("1b", figures | {"card": "NVIDIA H100 80GB HBM3", "data_sheet_gb_s": 3352})
    assert "| 1 | blt | 950 (977) | 190 (222) | **900** (1,078) | 180 (228) |" in said
    assert "| 16 | blt | 950 | 190 | 900 | 180 |" in said, "aims are for one sequence"
    assert "of 3,352 GB/s by the data sheet of NVIDIA H100 80GB HBM3" in said
    assert "global call 870 us" in said


@pytest.mark.parametrize(
    ("name", "rate"),
    [("NVIDIA H200", 4800), ("NVIDIA H100 80GB HBM3", 3352), ("NVIDIA H100 PCIe", 2039), ("NVIDIA GH200 480GB", None)],
)
def test_cards_are_known_by_the_words_of_their_names(name: str, rate: int | None) -> None:
    assert data_sheet_gb_s(name) == rate


def test_the_ahead_part_finds_one_text_with_every_policy(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = figures_of(ahead, setting)
    rows = figures["ahead"]
    assert [(row["decoder"], row["ahead"]) for row in rows] == [
        (way, when) for way in ahead.WAYS for when in ahead.AHEAD
    ]
    assert all(row["same_text"] for row in rows)
    assert figures["decided"]["T9, running ahead"].startswith("blt is fastest with ahead: ")
    assert "| blt-d B=8 | never |" in told("ahead", figures)


def test_the_ahead_part_reports_an_engine_that_writes_another_text(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = iter(range(1000))
    real = ahead.generate

    def other(*given: Any) -> Any:
        found = real(*given)
        return dataclasses.replace(found, texts=[[next(texts)]])

    monkeypatch.setattr(ahead, "generate", other)
    monkeypatch.setattr(ahead, "WAYS", {"blt": ahead.WAYS["blt"]})
    piece = Piece(setting.work / "other.json")
    ahead.measure(setting, piece)
    failures = json.loads((setting.work / "other.json").read_text())["failures"]
    assert len(failures) == 3 and "another text than without running ahead" in failures[0]


def test_the_profile_part_lists_operations_per_step(setting: Setting) -> None:
    rows = figures_of(profiling, setting)["steps"]
    assert [row["decoder"] for row in rows] == list(profiling.WAYS)[:2]
    assert all(row["top"] and row["launches_per_step"]["operations"] > 10 for row in rows)
    assert "| aten::" in told("profile", {"steps": rows})


def test_device_time_is_the_time_covered_by_any_kernel() -> None:
    def event(device: str, name: str, start: float, end: float) -> SimpleNamespace:
        time = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
        return SimpleNamespace(device_type=SimpleNamespace(name=device), name=name, time_range=time)

    taken = profiling.on_device(
        [
            event("CUDA", "linear", 10, 20), event("CUDA", "copy", 15, 25), event("CUDA", "linear", 40, 41),
            event("CPU", "cudaGraphLaunch", 0, 5), event("CPU", "aten::mm", 0, 50),
        ]
    )  # fmt: skip
    assert taken.busy == 16 and taken.spent == {"linear": 11, "copy": 10} and taken.calls["linear"] == 2
    assert taken.launches == {"cudaGraphLaunch": 1}


@pytest.mark.parametrize(("rate", "length"), [(0.9114, 8), (0.7693, 16), (0.5, 1)])
def test_replayed_drafts_are_accepted_at_the_papers_rate(rate: float, length: int) -> None:
    class Wrong:
        def round(self, sequence: Any, room: int) -> Iterator[Any]:
            return Committed([7], [], range(length), 0)
            yield

    decoder = replay.Replayed(Wrong(), rate, length, seed=random.Random(0).randrange(100))  # type: ignore[arg-type]
    stood = []
    for _ in range(4000):
        with pytest.raises(StopIteration) as end:
            next(decoder.round(None, 99))  # type: ignore[arg-type]
        outcome = end.value.value
        assert outcome.ids == [*range(outcome.accepted), 7]
        stood.append(outcome.accepted)
    assert sum(stood) / len(stood) / length == pytest.approx(rate, abs=0.02)


def test_unused_engines_are_freed_before_the_next_is_made(setting: Setting) -> None:
    model = random_model(setting.work, "tiny", "fast")
    first = weakref.ref(setting.engine(model))
    second = setting.engine(model)
    assert first() is None and second.stepper.device.type == "cpu"


def test_decoding_continues_correctly_after_replayed_text(setting: Setting) -> None:
    """What follows a replayed text is what follows the same text as a prompt."""
    engine = setting.engine(random_model(setting.work, "tiny", "fast"), dtype="float32")
    prompt = prompts(1, 30)
    for way in ("blt-s k=8", "blt-dv B=8", "blt-d B=8"):
        texts = generate(engine, prompt, 40, variants.RANDOM["fast"][way], replay.replayed(engine)).texts
        grown = [[*prompt[0], *texts[0]]]
        assert len(texts[0]) == 40
        assert generate(engine, grown, 6, {"decoder": "blt-s"}).texts == generate(engine, grown, 6, {}).texts


def test_kernel_tests_are_listed_one_by_one(setting: Setting) -> None:
    every = kernel_tests.tests(Setting("cuda", quick=False, work=setting.work))
    functions = {test.partition("[")[0] for test in every}
    assert len(every) == len(set(every)) > len(functions) > 20
    assert any(test.startswith("tests/gpu/test_rows.py::") for test in every)
    few = kernel_tests.tests(setting)
    assert 0 < len(few) < 20 and set(few) < set(every)


def test_kernel_tests_run_in_separate_processes_and_are_reported_as_they_end(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    passing, failing = "def test_good(): pass", "def test_bad(): assert 1 == 2"
    skipping = "import os, pytest\n@pytest.mark.skip(reason='no')\ndef test_skipped(): pass"
    torn = "@pytest.fixture\ndef torn():\n    raise OSError('no way')\ndef test_without(torn): pass"
    # What the process cannot tell at its end, as when it is cut.
    ending = "def test_ending(): os._exit(7)"
    file = setting.work / "test_some.py"
    file.write_text("\n".join([skipping, passing, failing, torn, ending]))
    monkeypatch.setattr(kernel_tests, "tests", lambda setting: [str(file)])
    piece = Piece(setting.work / "tests.json")
    kernel_tests.measure(setting, piece)
    content = json.loads((setting.work / "tests.json").read_text())
    assert content["figures"]["tests"] == {"passed": 1, "failed": 2, "skipped": 1}
    *failures, last = content["failures"]
    assert failures == ["test_bad: assert 1 == 2", "test_without: OSError: no way"]
    assert last.startswith("pytest ended with 7: ")
    assert "assert 1 == 2" in told("kernels", content["figures"])


def test_documented_wheels_are_those_that_the_gpu_check_installs() -> None:
    makefile, script = (ROOT / "Makefile").read_text(), (ROOT / "deploy" / "gpu_check.sh").read_text()
    documented = set(re.findall(r"^\| `([\w-]+)`", (ROOT / "docs" / "gpu.md").read_text(), re.M)) - set(PARTS)
    needed = {name for line in re.findall(r'^needed="(.*)"$', script, re.M) for name in line.split()} - {"$needed"}
    assert documented == needed - {"torch", "triton", "numpy"}
    asked = shlex.split(re.findall(r"^GPU_WHEELS := (.*)$", makefile, re.M)[0])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(asked) <= {*project["dependencies"], *project["optional-dependencies"]["dev"]}, "with the same bounds"
    assert {name.partition(">")[0] for name in asked} <= documented


BARE = """
import sys
from importlib import import_module
from importlib.metadata import packages_distributions

needed = set(sys.argv[1].split())
absent = {name for name, owners in packages_distributions().items() if not needed & {name, *owners}}
absent -= {"fastblt", "engine", "kernels", "server", "clients", "training"}
assert {"zmq", "attrs", "transformers", "tqdm"} <= absent

class Bare:  # finds nothing that is absent there
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Bare, sys.meta_path)
assert not absent & {name.partition(".")[0] for name in sys.modules}
for name in sys.argv[2:]:
    import_module(name)
"""


def test_every_part_of_the_gpu_check_imports_with_the_documented_modules_alone() -> None:
    script = (ROOT / "deploy" / "gpu_check.sh").read_text()
    needed = " ".join([*re.findall(r'^needed="(.*)"$', script, re.M), *TORCHS])
    files = [*map(Path, kernel_tests.TWINS), *(path.relative_to(ROOT) for path in (ROOT / "tests/gpu").glob("*.py"))]
    modules = [*(part.module for part in PARTS.values()), *(".".join(file.with_suffix("").parts) for file in files)]
    command = [sys.executable, "-c", BARE, needed, "benchmarks.gpu_check.__main__", *modules]
    # Other packages here bring plug-ins for it.
    environment = os.environ | {"HYPOTHESIS_NO_PLUGINS": "1"}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
