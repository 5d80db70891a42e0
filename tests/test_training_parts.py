"""What a run leaves in its folder: parts that are whole or not there, metrics of many processes, text in an archive."""

import json
import lzma
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_training_run import CONFIG, CORPUS, SETTINGS
from training import corpus, parts
from training.metrics import Metrics, read_metrics
from training.muon import Muon
from training.packing import packed, unpacked
from training.parts import PartError, read_parts, remove_others, write_parts
from training.state import State, StateError
from training.train import train

MOST = 40_000


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> State:
    state = State.new(SETTINGS, CONFIG)
    train(state, CORPUS, tmp_path_factory.mktemp("run"))
    return state


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40))
def test_packed_numbers_are_unpacked_to_the_same_bits(bits: list[int]) -> None:
    numbers = torch.from_numpy(np.array(bits, np.uint32).view(np.float32))
    found = unpacked(packed(numbers), tuple(numbers.shape))
    assert found.numpy().view(np.uint32).tolist() == bits


def test_packing_compresses_exponents_and_rounded_mantissas() -> None:
    numbers = torch.randn(100, 1000, generator=torch.Generator().manual_seed(0))
    assert len(packed(numbers)) < 0.87 * 4 * numbers.numel()
    assert len(packed(numbers.bfloat16().float())) < 0.4 * 4 * numbers.numel()
    with pytest.raises(ValueError, match="instead of 400008"):
        unpacked(packed(numbers), (100_002,))
    with pytest.raises(ValueError):
        unpacked(b"no deflate", (3,))


@settings(max_examples=25)
@given(data=st.binary(max_size=100), most=st.integers(1, 40), old=st.binary(max_size=60))
def test_parts_are_read_back_whole_and_the_next_write_removes_old_ones(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, most: int, old: bytes
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    write_parts(folder, old, 7)
    (folder / "state-9-0123.part.new").write_bytes(b"half")
    found = write_parts(folder, data, most)
    remove_others(folder, found)
    assert read_parts(folder, found) == data
    assert sorted(os.listdir(folder)) == sorted({part.file for part in found})
    assert all((folder / part.file).stat().st_size <= most for part in found)


def test_a_state_saved_in_parts_is_loaded_unchanged(trained: State, tmp_path: Path) -> None:
    trained.save(tmp_path, MOST)
    files = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert len(files) > 5 and all(size <= MOST for name, size in files.items() if name != "state.json")
    assert all(set(name) <= {*"abcdefghijklmnopqrstuvwxyz0123456789._-"} for name in files)
    found = State.load(tmp_path, CONFIG)
    assert found.config == trained.config and found.settings == trained.settings and found.steps == trained.steps
    assert found.corpus == CORPUS.digest and found.machines == trained.machines
    for (name, tensor), (other, expected) in zip(found._tensors(), trained._tensors(), strict=True):
        assert name == other and torch.equal(tensor, expected)


@pytest.mark.parametrize("cut_at", [1, 3, "manifest", "clearing"])
def test_an_interrupted_write_keeps_the_previous_state(
    trained: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut_at: int | str
) -> None:
    other = State.new(SETTINGS, CONFIG)
    other.save(tmp_path, MOST)
    replaced: list[str] = []

    def replace(source: Path, target: Path) -> None:
        replaced.append(target.name)
        if cut_at in (len(replaced), "manifest" if target.name == "state.json" else None):
            raise KeyboardInterrupt
        source.rename(target)

    def clear(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(parts.os, "replace", replace)
    if cut_at == "clearing":
        monkeypatch.setattr("training.state.remove_others", clear)
    with pytest.raises(KeyboardInterrupt):
        trained.save(tmp_path, MOST)
    monkeypatch.undo()
    expected = trained if cut_at == "clearing" else other
    assert torch.equal(State.load(tmp_path, CONFIG).weights["lm_head.weight"], expected.weights["lm_head.weight"])
    trained.save(tmp_path, MOST)
    named = {part["file"] for part in json.loads((tmp_path / "state.json").read_text())["parts"]}
    assert {path.name for path in tmp_path.iterdir()} == {"state.json", *named}


def test_an_error_names_a_missing_or_damaged_part(trained: State, tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"state\.json does not exist: there is no run in"):
        State.load(tmp_path, CONFIG)
    trained.save(tmp_path, MOST)
    second = next(tmp_path.glob("state-2-*.part"))
    content = second.read_bytes()
    for damage, message in (
        (None, "is missing"),
        (content[:-1], f"has {MOST - 1} bytes instead of {MOST}"),
        (content[:-1] + bytes([content[-1] ^ 1]), "is damaged"),
    ):
        second.unlink() if damage is None else second.write_bytes(damage)
        with pytest.raises(PartError, match=f"{second.name} {message}"):
            State.load(tmp_path, CONFIG)
    manifest = (tmp_path / "state.json").read_text()
    for text, message in (
        (manifest[:100], r"state\.json: "),
        (manifest.replace('"steps": 4', '"steps": "4"'), "steps"),
    ):
        (tmp_path / "state.json").write_text(text)
        with pytest.raises(StateError, match=message):
            State.load(tmp_path, CONFIG)
    (tmp_path / "state.json").write_text(manifest.replace(second.name, "../" + second.name))
    with pytest.raises(PartError, match="must lie in the folder"):
        State.load(tmp_path, CONFIG)


def test_metrics_of_a_lost_process_are_replaced_by_later_ones(tmp_path: Path) -> None:
    def measure(begin: int, end: int, by: float) -> None:
        with Metrics(tmp_path, begin) as metrics:
            for step in range(begin, end):
                metrics.add({"step": step + 1}, {"bits": torch.tensor(by), "right": torch.tensor(0.5)})
            metrics.flush()

    with pytest.raises(FileNotFoundError, match="copy those of all stages"):
        read_metrics(tmp_path)
    measure(0, 5, 1.0)
    measure(7, 9, 2.0)  # from a state that was lost
    measure(3, 6, 3.0)
    assert [(line["step"], line["bits"]) for line in read_metrics(tmp_path)] == [
        (1, 1.0), (2, 1.0), (3, 1.0), (4, 3.0), (5, 3.0), (6, 3.0)
    ]  # fmt: skip
    assert sorted(os.listdir(tmp_path)) == ["metrics-00000000.jsonl", "metrics-00000003.jsonl"]


def test_a_line_of_metrics_that_a_power_cut_left_torn_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "metrics-00000000.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}\n{"ste')
    (tmp_path / "metrics-00000002.jsonl").write_bytes(b'{"step": 3}\n{"step": 4, "bits": 1.\xff\0\0')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_corpus_archive_holds_the_library_and_its_version(tmp_path: Path) -> None:
    library = tmp_path / "library"
    for i in range(60):
        (library / f"a{i % 3}").mkdir(parents=True, exist_ok=True)
        (library / f"a{i % 3}" / f"{i}.py").write_text(f"# {i}\n" * i)
    (library / "a0.py").write_text("pass")
    archive = tmp_path / "corpus.tar.xz"
    assert corpus.write_archive(archive, library) == 61
    found = corpus.read_archive(archive)
    assert found == corpus.standard_library(library) == corpus.corpora(archive)
    assert found[0].digest == corpus.standard_library(library)[0].digest != found[1].digest
    again = tmp_path / "again.tar.xz"
    corpus.write_archive(again, library)
    assert again.read_bytes() == archive.read_bytes()
    for content in (b"", b"text", archive.read_bytes()[:400], lzma.compress(b"text")):
        archive.write_bytes(content)
        with pytest.raises(ValueError, match=r"corpus\.tar\.xz"):
            corpus.read_archive(archive)


def test_batched_muon_equals_torchs_muon() -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = [(24, 24), (32, 16), (24, 24), (16, 32), (32, 16)]
    ours = [torch.randn(shape, generator=draw, requires_grad=True) for shape in shapes]
    theirs = [matrix.detach().clone().requires_grad_() for matrix in ours]
    pair = Muon(ours, lr=0.02, weight_decay=0.01), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.01)
    for step in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=draw) if step or len(a) != 16 else None
            b.grad = None if a.grad is None else a.grad.clone()
        for optimizer in pair:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="matrices only"):
        Muon([torch.zeros(3)])
