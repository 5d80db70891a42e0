"""A training run: its corpus, that stopping it changes nothing, and the model folder it ends in."""

import math
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import checkpoint
from engine.config import BOS_ID, BYTE_OFFSET, EOS_ID, PAD_ID
from tests.models import our_config
from training import card as model_card
from training import loop as loops
from training.corpus import Corpus, standard_library
from training.export import CURVES, export
from training.loop import Stopped, falling
from training.metrics import Diverged, read_metrics
from training.plot import plot
from training.state import Settings, State, fraction
from training.train import block_weight, row_length, train

TEXTS = tuple(f"def f{i}(x):\n    return x + {i}\n".encode() * (1 + i % 7) for i in range(20))
CORPUS = Corpus(tuple(f"{i}.py" for i in range(20)), TEXTS)
CONFIG = our_config(decoder_input="embedding", mask_id=260, block_size=4)
CONFIG = replace(CONFIG, name="small", patching=replace(CONFIG.patching, max_patch_length=8), isolate_documents=True)
SETTINGS = Settings(steps=4, batch_bytes=256, lengths=((0.0, 64), (0.5, 128)), warm_up=2)


class InterruptedCorpus(Corpus):
    """Sends this process SIGTERM while it draws the rows of a given step."""

    at = -1

    def rows(self, draw: np.random.Generator, count: int, length: int) -> torch.Tensor:
        type(self).at -= 1
        if self.at == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().rows(draw, count, length)


def test_the_corpus_leaves_out_installed_packages_and_is_split_by_name(tmp_path: Path) -> None:
    for i in range(200):
        (tmp_path / f"{i}.py").write_text(f"# {i}\n")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("no")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    training, held_out = standard_library(tmp_path)
    assert {*training.names, *held_out.names} == {f"{i}.py" for i in range(200)}
    assert not {*training.names} & {*held_out.names}
    assert 3 <= len(held_out.names) <= 20
    assert standard_library(tmp_path) == (training, held_out)
    with pytest.raises(FileNotFoundError):
        standard_library(tmp_path / "nothing")


def test_a_training_row_is_one_slice_of_one_document() -> None:
    documents = [[*(b + BYTE_OFFSET for b in text), EOS_ID] for text in TEXTS]
    rows = CORPUS.rows(np.random.default_rng(0), 50, 40).tolist()
    assert all(len(row) == 41 and row[0] == BOS_ID for row in rows)
    for row in rows:
        piece = [i for i in row[1:] if i != PAD_ID]
        assert row[1 : 1 + len(piece)] == piece
        assert any(piece == d[i : i + len(piece)] for d in documents for i in range(len(d)))
    assert {row[1] for row in rows} != {ord("d") + BYTE_OFFSET}, "not only starts"
    assert any(EOS_ID in row for row in rows)


def test_evaluation_slices_hold_every_id_once() -> None:
    ids = [i for row in CORPUS.slices(16).tolist() for i in row[1:] if i != PAD_ID]
    assert ids == [i for text in TEXTS for i in [*(b + BYTE_OFFSET for b in text), EOS_ID]]


@pytest.mark.parametrize("stop_at", [2, 4, 7])
def test_a_stopped_training_run_resumes_to_the_same_result(tmp_path: Path, stop_at: int) -> None:
    whole = State.new(SETTINGS, CONFIG)
    train(whole, CORPUS, tmp_path / "whole")

    InterruptedCorpus.at = stop_at
    with pytest.raises(Stopped):
        train(State.new(SETTINGS, CONFIG), InterruptedCorpus(CORPUS.names, CORPUS.texts), tmp_path / "halves")
    resumed = State.load(tmp_path / "halves", CONFIG)
    assert sum(phase.step for phase in resumed.phases.values()) in (stop_at - 1, stop_at)
    train(resumed, CORPUS, tmp_path / "halves")

    assert resumed.config == whole.config
    for name, weight in whole.weights.items():
        assert torch.equal(resumed.weights[name], weight), name
    losses = [[line["bits"] for line in read_metrics(tmp_path / name)] for name in ("whole", "halves")]
    assert losses[0] == losses[1] and len(losses[0]) == 2 * (SETTINGS.steps or 0)


def test_a_diverged_training_run_ends_with_its_last_good_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(loops, "SAVE_SHARE", 0)  # saved after every step
    diverging = replace(SETTINGS, matrix_rate=1e38, warm_up=1)
    kept = rf"phase patcher, step (\d): \w+ is nan: .* {tmp_path} keeps the state after (\d) steps in all"
    with pytest.raises(Diverged, match=kept) as raised:
        train(State.new(diverging, CONFIG), CORPUS, tmp_path)
    failed, steps = map(int, re.findall(kept, str(raised.value))[0])
    state = State.load(tmp_path, CONFIG)
    assert state.steps == steps == failed - 1
    assert all(weight.isfinite().all() for weight in state.weights.values())
    losses = [line["bits"] for line in read_metrics(tmp_path)]
    assert len(losses) == failed and not math.isfinite(losses[-1]), "the line that tells why is kept"


def test_a_training_run_limited_in_minutes_ends_on_time() -> None:
    settings = replace(SETTINGS, steps=None, minutes=10.0, patcher_share=0.1)
    state = State.new(settings, CONFIG)
    patcher, main = state.phases["patcher"], state.phases["model"]
    patcher.seconds, main.seconds = 30.0, 270.0
    assert fraction(state, patcher) == pytest.approx(0.5) == fraction(state, main)
    main.seconds = 541.0
    assert fraction(state, main) == 1.0
    assert [row_length(settings, done) for done in (0.0, 0.49, 0.5, 1.0)] == [64, 64, 128, 128]
    with pytest.raises(ValueError, match="either"):
        Settings()


def test_a_training_run_exports_a_model_folder_with_card_and_curve(tmp_path: Path) -> None:
    state = State.new(SETTINGS, CONFIG)
    train(state, CORPUS, tmp_path / "run")
    result = export(state, CORPUS, CORPUS, tmp_path / "run", tmp_path / "out")
    loaded = checkpoint.load(tmp_path / "out")
    assert loaded.config == state.config
    for name, weight in state.weights.items():
        assert torch.equal(loaded.tensors[name], weight.to(torch.bfloat16)), name
    for name in (n for n in loaded.tensors if n.startswith("model.patcher.")):
        assert torch.equal(loaded.tensors[name].float(), state.weights[name]), "patches are served as they were trained"
    assert 0 < result.bits_per_byte < 9 and result.bytes == CORPUS.num_bytes
    assert 1 < result.mean_patch <= 8
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{result.bits_per_byte:.3f} bits per byte" in card and "PSF" in card
    assert re.search(r"that end in a loop \| \d+% \|", card)
    assert "of the first 2 bytes, of all 4 |" in card
    assert "`python -m training.evaluate FOLDER` measures it again" in card
    assert "gradient norm clipped at 1 in the model's phase;" in card
    with_packages = replace(CORPUS, sources=("cpython-3.11.7", "flask-3.1.3"))
    told = model_card.card(state, with_packages, result, 0.5, [b""] * len(model_card.PROMPTS))
    assert "`python -m training.evaluate FOLDER --corpus ARCHIVE` measures it again" in told
    assert "* Python source and its English documentation only." in told
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_weight_of_the_block_term_rises_in_a_straight_line() -> None:
    settings = replace(SETTINGS, mask_weight=0.5, blocks_from=0.6, block_warm_up=0.1)
    weights = [block_weight(settings, done) for done in (0.0, 0.59, 0.6, 0.65, 0.7, 1.0)]
    assert weights == pytest.approx([0, 0, 0, 0.25, 0.5, 0.5])
    at_once = replace(settings, block_warm_up=0.0)
    assert [block_weight(at_once, done) for done in (0.59, 0.6, 1.0)] == [0, 0.5, 0.5]


def test_blocks_join_later_and_rates_are_held(tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=8, blocks_from=0.5, full_share=0.5, hold=0.25)
    state = State.new(settings, CONFIG)
    before = state.weights["model.local_decoder.embed_tokens.weight"][CONFIG.mask_id].clone()
    train(state, CORPUS, tmp_path / "run")
    lines = [line for line in read_metrics(tmp_path / "run") if line["phase"] == "model"]
    assert ["mask" in line for line in lines] == [False] * 4 + [True] * 4
    assert not torch.equal(state.weights["model.local_decoder.embed_tokens.weight"][CONFIG.mask_id], before)
    plot(read_metrics(tmp_path / "run"), tmp_path / "loss.png", CURVES)
    assert [falling(settings.hold, part) for part in (0.0, 0.25)] == [1.0, 1.0]
    assert falling(settings.hold, 0.625) == pytest.approx(0.5) and falling(settings.hold, 1.0) == pytest.approx(0.0)
    with pytest.raises(ValueError, match="blocks_from is a share from 0 to 1, not 1.5"):
        replace(settings, blocks_from=1.5)


def test_an_ablation_reuses_the_patcher_of_another_run(tmp_path: Path) -> None:
    first = State.new(SETTINGS, CONFIG)
    with pytest.raises(ValueError, match="not finished its patcher"):
        State.new(SETTINGS, CONFIG).adopt_patcher(first)
    train(first, CORPUS, tmp_path / "first")

    ablation = State.new(replace(SETTINGS, mask_weight=0.0, seed=1), CONFIG)
    ablation.adopt_patcher(State.load(tmp_path / "first", CONFIG))
    train(ablation, CORPUS, tmp_path / "ablation")
    assert ablation.config.patching == first.config.patching
    assert ablation.phases["patcher"].bytes == first.phases["patcher"].bytes
    for name, weight in ablation.weights.items():
        assert torch.equal(weight, first.weights[name]) == name.startswith("model.patcher."), name
    assert {line["phase"] for line in read_metrics(tmp_path / "ablation")} == {"model"}
    result = export(ablation, CORPUS, CORPUS, tmp_path / "ablation", tmp_path / "out")
    assert result.bits_per_byte > 0
