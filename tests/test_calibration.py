"""`fastblt calibrate`: the entropies are the engine's own, and no threshold comes nearer to the wanted patch length."""

import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from engine.checkpoint import load, save
from engine.config import EngineConfig, PatchingRule
from engine.engine import Engine
from engine.entropies import CHUNK, Entropies
from engine.rows import Rows
from engine.sequence import Sequence
from engine.thresholds import Thresholds
from server.cli import app
from tests import reference
from tests.engines import make_engine, request, save_ours
from tests.models import HF_MODELS, OUR_MODELS, text
from tests.test_cli import fails
from tests.test_scoring import evaluate, some_bytes

runner = CliRunner()
RULES = {
    "threshold": PatchingRule(),
    "longest": PatchingRule(max_patch_length=3),
    "monotonic": PatchingRule(monotonic=True),
    "monotonic, longest": PatchingRule(monotonic=True, max_patch_length=5),
    "add": PatchingRule(threshold_add=0.25),
    "add, longest": PatchingRule(threshold_add=-0.25, max_patch_length=4),
}


# The search.


def mean_by_the_oracle(rule: PatchingRule, texts: list[list[float]], threshold: float) -> float:
    """Bytes per patch that begins with one: the last entropy of a text decides about a byte that is not there."""
    rule, total, patches = replace(rule, threshold=threshold), 0, 0
    for entropies in texts:
        starts = reference.patch_starts(rule, torch.tensor(entropies, dtype=torch.float32))
        total += len(entropies) - 1
        patches += sum(1 <= start < len(entropies) for start in starts)
    return total / patches


@settings(max_examples=50)
@given(
    st.sampled_from(sorted(RULES)),
    # Multiples of a quarter: sums and differences are exact, and ties are common.
    st.lists(st.lists(st.integers(0, 12).map(lambda n: n / 4), min_size=2, max_size=24), min_size=1, max_size=3),
    st.floats(0.5, 9),
)
def test_calibrate_finds_the_nearest_threshold(name: str, texts: list[list[float]], wanted: float) -> None:
    rule = RULES[name]
    thresholds = Thresholds(rule, [np.array(entropies, dtype=np.float32) for entropies in texts])
    found = thresholds.nearest(wanted)
    # Every value that entropies and their rises have, and what lies between two.
    all_means = [mean_by_the_oracle(rule, texts, n / 8) for n in range(-28, 29)]
    best = min(abs(mean - wanted) for mean in all_means)
    assert (
        found.mean_patch == mean_by_the_oracle(rule, texts, found.threshold) == thresholds.mean_patch(found.threshold)
    )
    assert abs(found.mean_patch - wanted) == pytest.approx(best, abs=1e-12)
    assert thresholds.range == (min(all_means), max(all_means))


@given(st.lists(st.floats(0, 5.5, width=32), min_size=2, max_size=30), st.floats(1, 6))
def test_the_printed_threshold_gives_the_same_patches_in_float32(entropies: list[float], wanted: float) -> None:
    values = np.array(entropies, dtype=np.float32)
    found = Thresholds(PatchingRule(), [values]).nearest(wanted)
    printed = float(repr(found.threshold))
    patches = 1 + int((values[1:-1] > np.float32(printed)).sum())
    assert found.mean_patch == (len(values) - 1) / patches


def test_calibrating_without_threshold_or_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="no threshold"):
        Thresholds(PatchingRule(mode="bytes"), [np.ones(5, dtype=np.float32)])
    with pytest.raises(ValueError, match="no byte"):
        Thresholds(PatchingRule(), [np.ones(1, dtype=np.float32)])
    assert Thresholds(PatchingRule(), [np.ones(2, dtype=np.float32)]).range == (1, 1)


# The entropies.


def engine_entropies(engine: Engine, ids: list[int]) -> list[float]:
    """Those that a sequence's patches were decided by, prefilled in pieces of another length."""
    sequence = Sequence(request("a", ids, 1), 0, engine.memory.caches.new_tables())
    for start in range(0, len(ids), 200):
        end = min(start + 200, len(ids))
        rows = Rows.prefill(sequence, end)
        assert engine.memory.reserve(rows)
        engine.stepper.run([rows])
        sequence.advance(end)
        engine.memory.trim(sequence)
    engine.memory.release(sequence)
    return sequence.patching.entropies.tolist()


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("plain", {}),
        ("gqa", {}),
        ("no-window", {}),
        ("64-patcher-positions", {"kernels": "torch"}),
        ("gqa", {"dtype": "bfloat16", "kernels": "torch"}),
    ],
)
def test_entropies_for_calibration_equal_the_engines(name: str, choices: dict[str, str], tmp_path: Path) -> None:
    if name in OUR_MODELS:
        save_ours(tmp_path, OUR_MODELS[name]())
    else:
        HF_MODELS[name]().save_pretrained(tmp_path)
    ids = text(CHUNK + 140, 3, specials=False)
    reader = Entropies(EngineConfig(str(tmp_path), page_size=16, **choices))  # type: ignore[arg-type]
    found = reader.of(ids)
    np.testing.assert_allclose(found, engine_entropies(make_engine(tmp_path, **choices), ids), atol=1e-4, rtol=0)
    # Its pages are used again, by texts that do not see the last one's.
    np.testing.assert_array_equal(reader.of(ids[:50]), found[:50])
    if not choices:
        loaded = load(tmp_path)
        expected = reference.entropies(loaded.config, loaded.tensors, ids)
        np.testing.assert_allclose(found, expected, atol=3e-4, rtol=0)


def test_calibrate_reads_only_the_patcher_of_the_model(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, asked = load(tiny), set()

    class Watched(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            asked.add(name)
            return super().__getitem__(name)

    monkeypatch.setattr(
        "engine.checkpoint.load", lambda path, patcher: replace(loaded, tensors=Watched(loaded.tensors))
    )
    Entropies(EngineConfig(str(tiny))).of([1, 100, 101])
    assert asked == {name for name in loaded.tensors if name.startswith("model.patcher.")}


# The command.


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "text.bin"
    path.write_bytes(some_bytes(600))
    return path


def calibrate(model: Path, *arguments: str | Path) -> dict:
    done = runner.invoke(app, ["calibrate", "--model", str(model), "--context=128", "--json", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["plain", "monotonic", "threshold-add"])
def test_a_model_with_the_calibrated_threshold_has_the_predicted_patches(name: str, tmp_path: Path, file: Path) -> None:
    config, tensors = OUR_MODELS[name]()
    save(tmp_path / "model", config, tensors)
    found = calibrate(tmp_path / "model", "--patch-size=2.5", file)
    assert found["mean_patch"] == pytest.approx(2.5, abs=0.05) and found["bytes"] == 600
    assert found["own_mean_patch"] == evaluate(tmp_path / "model", file, context=128).mean_patch
    changed = replace(config, patching=replace(config.patching, threshold=found["threshold"]))
    save(tmp_path / "changed", changed, tensors)
    assert evaluate(tmp_path / "changed", file, context=128).mean_patch == found["mean_patch"]


def test_calibrate_prints_a_table_a_histogram_and_the_command(tiny: Path, file: Path) -> None:
    flags = ["--patch-size=3", "--context=128", str(file)]
    done = runner.invoke(app, ["calibrate", "--model", str(tiny), *flags])
    assert done.exit_code == 0, done.output
    found, lines = calibrate(tiny, *flags), done.stdout.splitlines()
    threshold = found["threshold"]
    assert lines[-1] == f"fastblt serve --model {shlex.quote(str(tiny))} --patching-threshold {threshold!r}"
    assert any(line.split() == ["3", repr(threshold), f"{found['mean_patch']:.4f}"] for line in lines)
    assert [one["patch_size"] for one in found["nearby"]] == [2.0, 2.5, 3.0, 3.5, 4.0]
    bins = [line.split() for line in lines if re.match(r" +-?[\d.]+ to ", line)]
    shown = [int(words[3].replace(",", "")) for words in bins]
    assert shown == found["histogram"]["counts"]
    assert [len(words) > 4 and "█" in words[4] for words in bins] == [8 * 50 * n > 7 * max(shown) for n in shown]
    # BOS decides about the first byte of each slice and that is no decision.
    assert sum(shown) == 600 - found["slices"]
    (marked,) = [line for line in lines if f"3 bytes: {threshold:.6g}" in line]
    assert float(marked.split()[0]) <= threshold + 1e-3 <= float(marked.split()[2]) + 2e-3
    assert math.isclose(found["range"][0], 1)


def test_calibrate_draws_a_picture(tiny: Path, tmp_path: Path, file: Path) -> None:
    flags = ["calibrate", "--model", str(tiny), "--patch-size=3", f"--plot={tmp_path / 'picture.png'}", str(file)]
    done = runner.invoke(app, flags)
    assert done.exit_code == 0 and "█" not in done.stdout
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_calibrate_explains_in_one_line_why_it_cannot(
    tiny: Path, tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("calibrate", "--model", tiny, "--patch-size=4")
    too_long = fails("calibrate", "--model", tiny, "--patch-size=9", file)
    assert "--patch-size: no threshold gives 9: on these files the mean goes from 1.0000 to 8.0000" in too_long
    assert "no patch may be longer than 8 bytes" in too_long
    assert "no threshold gives 0.5" in fails("calibrate", "--model", tiny, "--patch-size=0.5", file)
    assert "no threshold gives nan" in fails("calibrate", "--model", tiny, "--patch-size=nan", file)
    assert "hold 4096" in fails(*command, "--context=4096", file)
    assert "No such file" in fails(*command, tmp_path / "none")
    assert "must end with .png, .svg or .pdf" in fails(*command, "--plot=a.txt", file)
    assert "is no directory" in fails(*command, f"--plot={tmp_path / 'none' / 'a.png'}", file)
    monkeypatch.setattr("server.calibration.find_spec", lambda name: None)
    assert "pip install matplotlib" in fails(*command, f"--plot={tmp_path / 'a.png'}", file)


def test_calibrate_refuses_a_model_with_single_byte_patches(tmp_path: Path, file: Path) -> None:
    HF_MODELS["every-byte"]().save_pretrained(tmp_path / "m")
    assert "there is no threshold" in fails("calibrate", "--model", tmp_path / "m", "--patch-size=2", file)
