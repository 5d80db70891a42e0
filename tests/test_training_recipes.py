"""Recipes: a run that branches off another one, its own blocks, and the comparison of both."""

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine import checkpoint
from engine.checkpoint import PRESETS, expected_shapes
from training import corpus, export, recipes, train
from training.evaluate import evaluate
from training.metrics import read_metrics
from training.model import initial_weights
from training.state import Settings, State

STAGE = ("--stage-minutes", "100000")
"""Which ends without a model; its minutes count from the start of the process, here of all tests."""


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    for i in range(60):
        (folder / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * (1 + i % 7))
    corpus.write_archive(folder / "corpus.tar.xz", folder)
    return folder / "corpus.tar.xz"


def trained(run: Path, archive: Path, *more: str) -> int:
    return train.main(["--run", str(run), "--corpus", str(archive), "--batch-bytes", "256", *STAGE, *more])


@pytest.fixture(scope="module")
def runs(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    first, branch = folder / "first", folder / "branch"
    assert trained(first, archive, "--preset", "tiny", "--steps", "4", "--blocks-from", "1", "--own-share", "0") == 0
    again = ["--branch-of", str(first), "--steps", "7", "--blocks-from", "0", "--own-share", "1"]
    assert train.main(["--run", str(branch), "--corpus", str(archive), *STAGE, *again]) == 0
    return [first, branch]


def test_a_branch_begins_where_its_run_stood_and_leaves_it_alone(runs: list[Path]) -> None:
    first, branch = (State.load(run) for run in runs)
    assert (first.phases["model"].step, branch.phases["model"].step) == (4, 7)
    # Its own settings are new, the others are its run's.
    assert branch.settings == replace(first.settings, steps=7, blocks_from=0.0, own_share=1.0)
    lines = [line for line in read_metrics(runs[1]) if line["phase"] == "model"]
    assert [line["step"] for line in lines] == list(range(1, 8))
    assert lines[:4] == [line for line in read_metrics(runs[0]) if line["phase"] == "model"]
    assert ["mask" in line for line in lines] == [False] * 4 + [True] * 3


def test_a_branch_keeps_the_shape_of_its_run(
    runs: list[Path], archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in (["--preset", "tiny"], ["--patcher-of", str(runs[0])], ["--model-of", str(runs[0])]):
        with pytest.raises(SystemExit):
            trained(tmp_path / "run", archive, "--branch-of", str(runs[0]), *more)
        assert "--branch-of keeps the shape, patcher and weights of its run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        trained(tmp_path / "run", archive, "--branch-of", str(tmp_path))
    assert "there is no run in" in capsys.readouterr().err


def test_a_resumed_run_does_not_begin_from_another(
    runs: list[Path], archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags in (["--branch-of"], ["--patcher-of"], ["--model-of"], ["--branch-of", "--model-of"]):
        with pytest.raises(SystemExit):
            trained(runs[1], archive, "--resume", *(word for flag in flags for word in (flag, str(runs[0]))))
        said = f"--resume goes on with the run in {runs[1]} as it is: leave out {' and '.join(flags)}"
        assert said in " ".join(capsys.readouterr().err.split())


def test_a_run_begins_from_a_finished_model_and_its_card_tells(
    runs: list[Path], archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    command = ["--corpus", str(archive), "--run"]
    assert export.main([*command, str(runs[0]), "--out", str(before)]) == 0
    finished = checkpoint.load(before)
    state = State.new(Settings(steps=2, preset="tiny"))
    state.adopt_model(before)
    assert all(torch.equal(weight, finished.tensors[name].float()) for name, weight in state.weights.items())

    assert trained(tmp_path / "run", archive, "--preset", "tiny", "--steps", "2", "--model-of", str(before)) == 0
    state = State.load(tmp_path / "run")
    assert (state.phases["patcher"].step, state.phases["model"].step) == (0, 2)
    assert state.config.patching == finished.config.patching
    for name, weight in state.weights.items():
        assert torch.equal(weight, finished.tensors[name].float()) == name.startswith("model.patcher."), name
    assert export.main([*command, str(tmp_path / "run"), "--out", str(after)]) == 0
    digest = hashlib.sha256((before / "model.safetensors").read_bytes()).hexdigest()[:12]
    card = (after / "README.md").read_text()
    assert f"earlier model (before, SHA-256 {digest}), and kept its patcher" in card and "in this run" in card
    assert "earlier model" not in (before / "README.md").read_text()

    for more, why in {
        ("--preset", "nano"): "has not the shape of the preset nano",
        ("--preset", "tiny", "--patcher-of", str(runs[0])): "--model-of brings its own patcher",
    }.items():
        with pytest.raises(SystemExit):
            trained(tmp_path / "other", archive, "--steps", "2", "--model-of", str(before), *more)
        assert why in capsys.readouterr().err


def test_runs_are_compared_on_the_same_files(
    runs: list[Path], archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "curves.png"
    assert recipes.main([*map(str, runs), "--corpus", str(archive), "--picture", str(picture)]) == 0
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head.endswith("| drafts kept, of the first 4 bytes | of all 8 |")
    assert [row.split(" | ")[0] for row in rows] == ["| first", "| branch"]
    assert "own_share 1.0" in rows[1] and "own_share 0.0" in rows[0]
    state = State.load(runs[1])
    found = evaluate(state.config, {n: w.detach() for n, w in state.weights.items()}, corpus.corpora(archive)[1])
    assert rows[1].endswith(f"| {found.bits_per_byte:.3f} | {found.kept[0]:.1%} | {found.kept[1]:.1%} |")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_runs_of_other_texts_are_not_compared(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(60):
        (tmp_path / f"{i}.py").write_text(f"{i}\n")
    corpus.write_archive(tmp_path / "other.tar.xz", tmp_path)
    assert recipes.main([str(runs[0]), "--corpus", str(tmp_path / "other.tar.xz")]) == 1
    assert "the run in first learnt from another text" in capsys.readouterr().err


def test_a_sample_of_held_out_files_has_whole_documents_within_a_bound(archive: Path) -> None:
    everything = corpus.corpora(archive)[0]
    part = everything.sample(2000)
    assert 1000 < part.num_bytes <= 2000 and set(part.names) < set(everything.names)
    assert everything.sample(1 << 30).num_bytes == everything.num_bytes
    assert len(everything.sample(1).texts) == 1


@torch.no_grad()
def test_all_of_a_draft_is_kept_if_every_row_writes_the_same(archive: Path) -> None:
    config = PRESETS["tiny"]
    weights = initial_weights(config, expected_shapes(config), 0)
    weights["lm_head.weight"] = torch.zeros_like(weights["lm_head.weight"])  # every row writes id 0
    held_out = corpus.corpora(archive)[1]
    assert evaluate(config, weights, held_out, context=128).kept == (1.0, 1.0)
    # A row of a random model writes something else than a draft.
    weights["lm_head.weight"] = torch.randn(weights["lm_head.weight"].shape, generator=torch.Generator().manual_seed(1))
    half, whole = evaluate(config, weights, held_out, context=128).kept
    assert whole <= half < 0.5


def test_slices_of_few_bytes_have_blocks_too(archive: Path) -> None:
    config = PRESETS["tiny"]
    weights = initial_weights(config, expected_shapes(config), 0)
    held_out = corpus.corpora(archive)[1].sample(500)
    for context in (8, 127):
        found = evaluate(config, weights, held_out, context=context)
        assert all(map(math.isfinite, (*found.masked_accuracy_by_place, *found.kept))), context
    for context in (0, 7):
        with pytest.raises(ValueError, match=f"--context {context}: must be at least 8, the bytes of a block"):
            evaluate(config, weights, held_out, context=context)
