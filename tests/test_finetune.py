"""`fastblt finetune`: a model without [MASK] gets one, its patcher keeps its bits, and a stopped run goes on as if it
had never stopped."""

import json
import os
import resource
import shlex
import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine import checkpoint
from engine.checkpoint import CheckpointError, random_tensors
from engine.config import BOS_ID, BYTE_OFFSET, EOS_ID, PAD_ID, PatchingRule
from server.cli import app
from tests.engines import make_engine, save_ours
from tests.engines import request as asked
from tests.engines import run as answered
from tests.models import HF_MODELS, OUR_MODELS, our_config, our_model, text
from tests.other_device import DEVICE, other_device
from tests.test_checkpoint_formats import META_CONFIG, write_meta
from tests.test_cli import fails, runner
from training import convert, documents, model
from training.continuing import continuing
from training.documents import LARGE, LEAST_TEXT, Documents, open_documents, slices
from training.finetune import Job, begin, resumed, save, train
from training.loop import Stopped
from training.metrics import read_metrics
from training.state import PATCHER
from training.tuning import FILE, TABLE_RATE, Settings, on_device
from training.tuning_report import report, summary

CPU = torch.device("cpu")
LINES = [f"line {i}: the sum of {i} and {i % 7} is {i + i % 7}\n" for i in range(4000)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a released BLT in Hugging Face's layout, and text as one file and as JSON lines."""
    found = tmp_path_factory.mktemp("finetune")
    HF_MODELS["k2"]().save_pretrained(found / "hf")
    (found / "text.txt").write_text("".join(LINES))
    objects = [json.dumps({"text": "".join(LINES[i : i + 8])}) for i in range(0, len(LINES), 8)]
    (found / "text.jsonl").write_text("\n".join(objects) + "\n\n")
    return found


def settings(folder: Path, **changes: Any) -> Settings:
    given = {
        "model": str(folder / "hf"),
        "files": (str(folder / "text.jsonl"),),
        "steps": 8,
        "rows": 2,
        "row_bytes": 96,
        "block_size": 4,
        "dtype": "float32",
        "held_out_bytes": 4000,
    }
    return Settings(**(given | changes))


@pytest.fixture(scope="module")
def finished(folder: Path) -> Job:
    job = begin(settings(folder, accumulate=2), "tuned", folder / "run", CPU)
    train(job)
    save(job, folder / "tuned")
    return job


def test_the_model_has_a_mask_and_its_patcher_the_same_bits(folder: Path, finished: Job) -> None:
    before, after = checkpoint.load(folder / "hf"), checkpoint.load(folder / "tuned")
    assert (after.format, after.config.mask_id, after.config.block_size) == ("fastblt", 260, 4)
    assert after.config.decoder_input == "embedding"
    assert after.config.patching == before.config.patching
    changed = {name for name, tensor in before.tensors.items() if not torch.equal(tensor, after.tensors[name])}
    assert {name.split(".")[1] for name in changed} == {"local_decoder", "weight"}, "only the decoder, and the head"
    assert len(changed) > 20


def test_every_decoder_runs_on_it_and_exact_ones_write_the_text_of_blt(folder: Path, finished: Job) -> None:
    engine = make_engine(folder / "tuned")
    decoders = ("blt", "blt-s", "blt-d", "blt-dv", "auto")
    requests = [asked(name, text(40, 3, specials=False), 24, decoder=name) for name in decoders]
    found = answered(engine, requests)
    assert all(len(found[name].ids) == 24 for name in decoders)
    assert {tuple(found[name].ids) for name in decoders if name != "blt-d"} == {tuple(found["blt"].ids)}


def test_each_phase_trains_what_it_says(folder: Path) -> None:
    job = begin(settings(folder, steps=10), "tuned", folder / "phases", CPU)
    tuning = job.tuning
    kept = {name: weight.detach().clone() for name, weight in tuning.weights.items()}
    tables = []

    def watched(name: str) -> float:
        tables.append((name, tuning.weights[convert.TABLE].detach().clone()))
        others = {n for n, w in tuning.weights.items() if n != convert.TABLE and not torch.equal(w, kept[n])}
        assert not others or name == "blocks"
        return type(tuning).fraction(tuning, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.finetune._done", lambda tuning, name: lambda: watched(name))
        train(job)
    last_of_table = [table for name, table in tables if name == "table"][-1]
    last_of_mask = [table for name, table in tables if name == "mask"][-1]
    assert not torch.equal(last_of_table[:-1], kept[convert.TABLE][:-1])
    assert torch.equal(last_of_table[-1], kept[convert.TABLE][-1]) and torch.equal(
        last_of_mask[:-1], last_of_table[:-1]
    )
    assert not torch.equal(last_of_mask[-1], last_of_table[-1])
    lines = read_metrics(job.run)
    assert [line["phase"] for line in lines] == ["table"] * 2 + ["mask"] + ["blocks"] * 7
    assert ["mask" in line for line in lines] == [False] * 2 + [True] * 8


def test_the_phases_make_as_many_steps_as_were_asked_for(folder: Path, tmp_path: Path) -> None:
    tuning = begin(settings(folder), "tuned", tmp_path / "run", CPU).tuning
    three, two = dict(tuning.phases), {name: phase for name, phase in tuning.phases.items() if name != "table"}
    for phases in (three, two):
        tuning.phases = phases
        for steps in [*range(3, 60), 1000, 1001]:
            each = [tuning._steps_of(name, steps) for name in phases]
            assert sum(each) == steps and min(each) >= 1, (steps, each)
    tuning.phases = three
    assert [tuning._steps_of(name, 1000) for name in three] == [150, 50, 800]


def test_own_blocks_are_learnt_in_the_last_phase(folder: Path, tmp_path: Path) -> None:
    job = begin(settings(folder, own_share=0.5, steps=10), "tuned", tmp_path / "run", CPU)
    asked: list[tuple[int, int]] = []
    with pytest.MonkeyPatch.context() as patch:

        def noting(*of: Any) -> Callable[[torch.Tensor], torch.Tensor]:
            made = continuing(*of)

            def continued(starts: torch.Tensor) -> torch.Tensor:
                found = made(starts)
                asked.append((job.tuning.steps, len(found)))
                assert found.shape == (*starts.shape, 4)
                return found

            return continued

        patch.setattr("training.finetune.continuing", noting)
        train(job)
    first_of_blocks = sum(phase.step for name, phase in job.tuning.phases.items() if name != "blocks")
    assert asked == [(step, 1) for step in range(first_of_blocks, job.tuning.steps)], "one of two rows"
    with pytest.raises(ValueError, match=r"--own-share 1\.5: must be a share from 0 to 1"):
        settings(folder, own_share=1.5)


def test_the_first_table_is_the_mean_state_of_each_byte() -> None:
    config, weights = OUR_MODELS["plain"]()
    rows = torch.tensor([text(80, seed, specials=False) for seed in range(4)])
    table = convert.first_table(config, weights, [rows[:2], rows[2:]], torch.float32)
    assert table.shape == (config.vocab_size + 1, config.decoder.dim)
    patches = model.patch(config.patching, model.entropies(config, weights, rows))
    states, _ = model.encode(config, weights, rows, patches, torch.float32)
    for byte in (1, 104, 119):
        torch.testing.assert_close(table[byte], states[rows == byte].mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(table[-1], table[:-1].mean(0))
    assert table[7].isfinite().all() and table[7].any(), "a byte that does not occur has a row too"


@pytest.fixture(scope="module")
def whole(folder: Path) -> Job:
    job = begin(settings(folder), "tuned", folder / "whole", CPU)
    train(job)
    return job


@pytest.mark.parametrize("stop_at", [1, 5])
def test_a_stopped_fine_tuning_run_resumes_to_the_same_weights(
    folder: Path, whole: Job, tmp_path: Path, stop_at: int
) -> None:
    job = begin(settings(folder), "tuned", tmp_path / "halves", CPU)
    draw = Documents.rows
    left = stop_at

    def interrupted(self: Documents, *arguments: Any) -> torch.Tensor:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(self, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Documents, "rows", interrupted)
        train(job)
    again = resumed(tmp_path / "halves", CPU, {})
    assert again.tuning.steps == stop_at
    train(again)
    for name, weight in whole.tuning.weights.items():
        assert torch.equal(again.tuning.weights[name], weight), name
    assert again.tuning.bits_before == whole.tuning.bits_before
    losses = [[line["bits"] for line in read_metrics(run)] for run in (whole.run, tmp_path / "halves")]
    assert losses[0] == losses[1] and len(losses[0]) == 8


def test_accumulated_micro_batches_give_the_gradients_of_one_batch(folder: Path, tmp_path: Path) -> None:
    norms = []
    for rows, accumulate in ((4, 1), (2, 2)):
        files = (str(folder / "text.txt"),)
        chosen = settings(folder, steps=3, rows=rows, accumulate=accumulate, files=files, row_bytes=64)
        job = begin(chosen, "tuned", tmp_path / f"{rows}", CPU)
        train(job)
        norms.append([line["norm"] for line in read_metrics(job.run)][0])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4), "the first phase has no corruption, which is drawn by batch"


def test_all_but_the_patcher_is_trained_if_asked_for(folder: Path, tmp_path: Path) -> None:
    job = begin(settings(folder, train="all", recompute=True), "tuned", tmp_path / "run", CPU)
    kept = {name: tensor.clone() for name, tensor in job.tuning.source.tensors.items()}
    train(job)
    done = job.tuning.finished()
    same = {name for name, tensor in kept.items() if torch.equal(done[name], tensor)}
    assert same == {name for name in kept if name.startswith(PATCHER)}


@pytest.mark.slow
def test_a_run_on_a_device_gives_the_weights_of_one_on_the_host(folder: Path, tmp_path: Path) -> None:
    # Fused AdamW is for devices that torch has kernels for; the one here runs each operation alone.
    adamw = torch.optim.AdamW
    chosen = settings(folder, steps=3, rows=1, row_bytes=48, recompute=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.state.AdamW", lambda *a, **k: adamw(*a, **(k | {"fused": False, "foreach": False})))
        here = begin(chosen, "tuned", tmp_path / "here", CPU)
        train(here)
        with other_device():
            train(begin(chosen, "tuned", tmp_path / "there", DEVICE))
            there = resumed(tmp_path / "there", DEVICE, {}).tuning
            found = there.finished()
        assert there.device == DEVICE and there.steps == here.tuning.steps == 3
    for name, weight in here.tuning.finished().items():
        torch.testing.assert_close(found[name], weight, atol=1e-4, rtol=0)


def test_a_model_whose_decoder_has_a_table_keeps_it(tmp_path: Path, folder: Path) -> None:
    rule = PatchingRule(max_patch_length=8)
    config, weights = our_model(our_config(decoder_input="embedding", patching=rule), 31)
    ours = save_ours(tmp_path / "ours", (config, weights))
    job = begin(settings(folder, model=str(ours), own_share=0.5), "tuned", tmp_path / "run", CPU)
    assert list(job.tuning.phases) == ["mask", "blocks"]
    torch.testing.assert_close(job.tuning.weights[convert.TABLE][:-1], weights[convert.TABLE])
    train(job)
    save(job, tmp_path / "out")
    assert checkpoint.load(tmp_path / "out").config.mask_id == 260
    report(job, tmp_path / "out", prompts=0, prefixes=1)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The decoder had a table, and\nkept it. First the row of [MASK] alone" in card
    assert "the mean of the encoder's states" not in card
    assert "There the blocks of\n50% of the rows start anywhere and hold the model's own greedy continuations" in card
    assert "Not measured (`--prompts 0`). `fastblt compare --model FOLDER --write FILE...`" in card


def test_a_bfloat16_model_in_metas_layout_is_trained_and_keeps_its_rules(folder: Path, tmp_path: Path) -> None:
    tensors = random_tensors(META_CONFIG, 0, torch.bfloat16)
    write_meta(tmp_path / "blt_1b", tensors, hub=True, beside=True)
    chosen = settings(folder, model=str(tmp_path / "blt_1b"), dtype="bfloat16", steps=3)
    job = begin(chosen, "tuned", tmp_path / "run", CPU)
    train(job)
    save(job, tmp_path / "out")
    saved = checkpoint.load(tmp_path / "out")
    assert {tensor.dtype for tensor in saved.tensors.values()} == {torch.bfloat16}
    assert saved.config == convert.with_blocks(META_CONFIG, "tuned", 4)


def test_the_report_measures_what_was_saved(folder: Path, finished: Job) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.decoding.WALK_BYTES", 48)
        patch.setattr("training.decoding.PROMPT_BYTES", 32)
        found = report(finished, folder / "tuned", prompts=1, prefixes=4)
    assert found.before == finished.tuning.bits_before and 0 < found.after < 20
    assert found.held_out == 4000
    names = {row["name"]: row for row in found.decoders["rows"]} if found.decoders else {}
    assert {"BLT", "BLT-S k=4", "BLT-DV-4 one step", "BLT-D-4 conf 0.7", "auto"} <= names.keys()
    assert names["BLT-DV-4 one step"]["real_acceptance"] is not None
    card = (folder / "tuned" / "README.md").read_text()
    assert f"{found.before:.4f} | {found.after:.4f}" in card and "| BLT-DV-4 one step |" in card
    assert "First the decoder's table alone" in card and "own greedy continuations" not in card
    rate = f"{TABLE_RATE * finished.tuning.table_size:.2g}"
    assert f"AdamW {rate} for the decoder's table where it is trained alone" in card
    assert "then Muon 0.005 for matrices, AdamW\n0.001 for the rest" in card
    assert "Measured by `fastblt finetune` on the held-out text." in card and "measures it again" not in card
    assert {"loss.png", "decoders.json", "decoders.png"} <= {path.name for path in (folder / "tuned").iterdir()}
    assert summary(found).startswith(f"next byte: {found.before:.4f} bits before, {found.after:.4f} after")


def test_the_report_leaves_the_device_to_the_engine(folder: Path, tmp_path: Path) -> None:
    job = begin(settings(folder, steps=3, dtype="bfloat16"), "tuned", tmp_path / "run", CPU)
    train(job)
    save(job, tmp_path / "out")
    held = [weakref.ref(job.tuning.weights[name]) for name in job.tuning.trained]
    card = tmp_path / "out" / "README.md"
    asked: list[tuple[Any, ...]] = []

    def copied(*arguments: Any) -> dict[str, torch.Tensor]:
        found = on_device(*arguments)
        held.extend(map(weakref.ref, found.values()))
        return found

    def measured(*arguments: Any) -> None:
        asked.append(arguments)
        assert len(held) > len(job.tuning.trained) and not [one for one in held if one() is not None]
        assert "| next byte, bits |" in card.read_text() and "Not measured (the report was stopped" in card.read_text()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore about it.")

    job.tuning.release()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.tuning_report.on_device", copied)
        patch.setattr("training.decoding.measure", measured)
        found = report(job, tmp_path / "out", prompts=1, prefixes=4)
        assert found.why == "CUDA out of memory. Tried to allocate 2.00 GiB."
        assert f"Not measured ({found.why})" in card.read_text() and f"not measured ({found.why})" in summary(found)
        assert asked[0][-2:] == ("float32", "cpu")
        job.tuning.device = torch.device("cuda")
        patch.setattr("training.tuning_report._next_byte", lambda *of: (1.0, 0.5))
        report(job, tmp_path / "out", prompts=1, prefixes=4)
        assert asked[1][-2:] == ("bfloat16", "cuda")
        patch.setattr("training.decoding.measure", lambda *of: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            report(job, tmp_path / "out", prompts=1, prefixes=4)


def test_a_run_that_was_stopped_in_its_report_makes_it_again(folder: Path, finished: Job) -> None:
    killed = folder / "tuned" / ".unfinished-by-a-signal"
    killed.mkdir()
    (killed / "model.safetensors").write_bytes(b"x")
    arguments = ["--resume", "--run", str(finished.run), "--out", str(folder / "tuned"), "--prompts", "0"]
    result = runner.invoke(app, ["finetune", *arguments])
    assert result.exit_code == 0, result.output
    assert f"next byte: {finished.tuning.bits_before:.4f} bits before" in result.stdout
    assert "not measured (`--prompts 0`)" in result.stdout
    assert not killed.exists()


def test_a_resumed_run_replaces_its_own_model_and_no_other(
    folder: Path, finished: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.tuning_report.report", lambda *arguments: None)
    monkeypatch.setattr("training.tuning_report.summary", str)
    run = tmp_path / "run"
    finished.tuning.save(run)
    save(finished, tmp_path / "own")
    checkpoint.save(tmp_path / "other", replace(finished.tuning.config, name="other"), finished.tuning.finished())
    before = {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    again = ["finetune", "--resume", "--run", str(run), "--out"]
    said = fails(*again, str(tmp_path / "other"))
    assert f"{tmp_path / 'other'} holds another model than the run in {run} makes" in said
    assert {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()} == before
    result = runner.invoke(app, [*again, str(tmp_path / "own")])
    assert result.exit_code == 0, result.output


def test_gradients_are_clipped_in_an_order_that_every_process_has(folder: Path, tmp_path: Path) -> None:
    """Their common norm is a sum in that order; the order of a set differs from process to process."""
    job = begin(settings(folder, steps=10), "tuned", tmp_path / "run", CPU)
    clip, orders = torch.nn.utils.clip_grad_norm_, []

    def watched(weights: Sequence[torch.Tensor], most: float) -> torch.Tensor:
        orders.append([next(n for n, w in job.tuning.weights.items() if w is weight) for weight in weights])
        return clip(weights, most)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.utils.clip_grad_norm_", watched)
        train(job)
    assert orders[0] == [convert.TABLE] and orders[-1] == list(job.tuning.trained) and len(orders[-1]) > 10


def test_rows_are_slices_of_single_documents_and_what_is_held_out_is_never_drawn(folder: Path) -> None:
    for name in ("text.txt", "text.jsonl"):
        training, held_out = open_documents([folder / name], [], "text")
        learnt, kept = b"".join(training.texts(1 << 30)), b"".join(held_out.texts(1 << 30))
        assert (learnt + kept).decode() == "".join(LINES)
        assert 0.03 < len(kept) / len(learnt + kept) < 0.07
        documents = [[*(b + BYTE_OFFSET for b in found), EOS_ID] for found in training.texts(1 << 30)]
        joined = ",".join(map(str, [PAD_ID, *(i for d in documents for i in [*d, PAD_ID])]))
        rows = training.rows(np.random.default_rng(0), 60, 200).tolist()
        assert all(row[0] == BOS_ID and len(row) == 201 for row in rows)
        for row in rows:
            piece = [i for i in row[1:] if i != PAD_ID]
            assert row[1 : 1 + len(piece)] == piece
            assert ",".join(map(str, piece)) in joined
        if name == "text.jsonl":
            assert any(EOS_ID in row for row in rows)
            assert any(row[1] != documents[0][0] for row in rows), "not only starts"


def test_every_held_out_file_is_measured_in_proportion_to_its_size(tmp_path: Path) -> None:
    sizes = {"a.txt": 60_000, "b.jsonl": 20_000, "c.txt": 40_000}
    for name, size in sizes.items():
        lines = [json.dumps({"text": name[0] * 80}) + "\n"] * (size // 93)
        (tmp_path / name).write_text("".join(lines) if name == "b.jsonl" else name[0] * size)
    held_out = open_documents([Path(__file__)], [tmp_path / name for name in sizes], "text")[1]
    joined = b"".join(held_out.texts(12_000))
    assert [joined.count(letter) for letter in (b"a", b"b", b"c")] == pytest.approx([6000, 2000, 4000], rel=0.02)
    assert len(joined) == 12_000
    everything = b"".join(held_out.texts(1 << 30))
    assert [everything.count(letter) for letter in (b"a", b"b", b"c")] == [60_000, 20_000 // 93 * 80, 40_000]


def test_many_small_files_keep_no_file_open(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"{number}.txt").write_bytes(b"%d " % number * 3000)
    training, held_out = open_documents(sorted(tmp_path.iterdir()), [], "text")
    before = len(os.listdir("/proc/self/fd"))
    training.rows(np.random.default_rng(0), 200, 64)
    assert held_out.texts(1 << 20) and len(os.listdir("/proc/self/fd")) == before


def test_of_many_small_files_some_are_measured_in_pieces_that_are_long_enough(tmp_path: Path) -> None:
    for i in range(100):
        (tmp_path / f"{i:03}.txt").write_bytes(bytes([i]) * 2000)
    held_out = open_documents([Path(__file__)], sorted(tmp_path.iterdir()), "text")[1]
    pieces = held_out.texts(20_000)
    assert sum(map(len, pieces)) == 20_000 and all(len(piece) >= LEAST_TEXT for piece in pieces[:-1])
    assert pieces[0][0] < 10 and pieces[-1][0] == 99, "from the first files to the last"
    (tmp_path / "one").write_bytes(b"x" * 5000)
    held_out = open_documents([Path(__file__)], [tmp_path / "one"], "text")[1]
    assert held_out.texts(700) == [b"x" * 700]


def test_copies_of_a_file_are_not_learnt_from_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [b"%d " % i * 2000 for i in range(120)]
    for i, words in enumerate(texts):
        for name in (f"{i:03}.txt", f"copy of {i:03}.txt"):
            (tmp_path / name).write_bytes(words)
    files = sorted(tmp_path.iterdir())
    found = open_documents(files, [], "text")
    learnt, kept = (set(documents.texts(1 << 30)) for documents in found)
    assert learnt | kept == set(texts) and not learnt & kept and kept
    assert sum(len(documents.parts) for documents in found) == 120
    assert capsys.readouterr().err == "left out: 120 of 240 files, copies of others\n"
    with pytest.raises(ValueError, match=r"copy of 003\.txt cannot be both learnt .* it has the bytes of .*/003\.txt"):
        open_documents(files[:120], [files[123]], "text")


def test_small_files_of_one_name_are_held_out_by_their_bytes_and_empty_ones_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / f"book{i}" / "text.txt" for i in range(200)]
    for i, path in enumerate(files):
        path.parent.mkdir()
        path.write_bytes(b"%d " % i * 1000)
    files[7].write_bytes(b"")
    found = open_documents(files, [], "text")
    learnt, kept = (len(documents.parts) for documents in found)
    assert learnt + kept == 199 and 3 <= kept <= 20
    assert capsys.readouterr().err == "left out: 1 of 200 files, empty\n"
    with pytest.raises(ValueError, match=r"book7/text\.txt: the file is empty, and so are all others"):
        open_documents([files[7], files[7]], [], "text")


def test_drawing_rows_walks_the_files_once(tmp_path: Path) -> None:
    class Watched(tuple[documents.Part, ...]):
        walks = 0

        def __iter__(self) -> Iterator[documents.Part]:
            self.walks += 1
            return super().__iter__()

    (tmp_path / "text.txt").write_bytes(b"some words " * 1000)
    learnt = Documents(parts := Watched(open_documents([Path(__file__)], [tmp_path / "text.txt"], "text")[1].parts))
    for seed in range(3):
        learnt.rows(np.random.default_rng(seed), 8, 64)
    assert parts.walks == 2, "for the sizes and their sum"


def test_hundreds_of_large_files_keep_few_open(tmp_path: Path) -> None:
    for number in range(300):
        with (tmp_path / f"{number:03}.txt").open("wb") as file:
            file.write(b"%d" % number)
            file.truncate(LARGE)
    training, held_out = open_documents(sorted(tmp_path.iterdir()), [], "text")
    before = len(os.listdir("/proc/self/fd"))
    assert training.digest and held_out.texts(1 << 20)
    assert len(os.listdir("/proc/self/fd")) <= before + 256


def test_held_out_lines_of_little_text_are_refused(folder: Path, tmp_path: Path) -> None:
    line = json.dumps({"text": "", "more": "x" * 50}) + "\n"
    (tmp_path / "empty.jsonl").write_text(line * 200)
    (tmp_path / "few.jsonl").write_text(line * 200 + json.dumps({"text": "few"}) + "\n")
    for name, size in (("empty", 0), ("few", 3)):
        held_out = str(tmp_path / f"{name}.jsonl")
        with pytest.raises(ValueError, match=rf"{name}\.jsonl: {size} bytes of held-out text are too few .* 4,000"):
            begin(settings(folder, held_out=(held_out,)), "tuned", tmp_path / "run", CPU)


def test_no_more_is_read_than_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    class Watched(bytes):
        def __getitem__(self, key: Any) -> Any:
            read.append(key.stop - key.start)
            return super().__getitem__(key)

    (tmp_path / "large.txt").write_bytes(bytes(50_000))
    held_out = open_documents([Path(__file__)], [tmp_path / "large.txt"], "text")[1]
    monkeypatch.setattr(documents, "_contents", lambda *file: Watched(50_000))
    assert held_out.texts(5000) == [bytes(5000)] and read == [5000], "a copy of a whole file may not fit"


def test_the_name_of_a_line_file_may_be_in_capitals(tmp_path: Path) -> None:
    for name in ("a.JSONL", "b.NdJson", "c.json.txt"):
        (tmp_path / name).write_text('{"text": "abc"}\n' * 400 + "\n" * ord(name[0]))
    files = sorted(tmp_path.iterdir())
    held_out = open_documents([Path(__file__)], files, "text")[1]
    assert [part.field for part in held_out.parts] == ["text", "text", None]
    assert held_out.texts(1 << 20)[:800] == [b"abc"] * 800


def test_slices_hold_every_byte_once() -> None:
    rows = slices([b"abcdefg", b"hi"], 3)
    assert [bytes(i - BYTE_OFFSET for i in row[1:] if i != PAD_ID) for row in rows.tolist()] == [
        b"abc",
        b"def",
        b"g",
        b"hi",
    ]
    assert (rows[:, 0] == BOS_ID).all()


def has_mask(folder: Path) -> dict[str, Any]:
    return {"model": str(save_ours(folder / "masked", OUR_MODELS["fast-blt"]()))}


def empty_file(folder: Path) -> dict[str, Any]:
    (folder / "empty.txt").write_text("")
    return {"files": (str(folder / "empty.txt"),)}


def short_file(folder: Path) -> dict[str, Any]:
    (folder / "short.txt").write_text("a few words\n" * 9)
    return {"files": (str(folder / "short.txt"),)}


def lines(folder: Path, odd: str, at: int) -> dict[str, Any]:
    """A file of 9,001 lines, of which that number `at` is `odd`; the last 450 are held out."""
    found = ['{"text": "one"}\n'] * 9000
    found.insert(at, f"{odd}\n")
    (folder / "broken.jsonl").write_text("".join(found))
    return {"files": (str(folder / "broken.jsonl"),)}


def held_out_twice(folder: Path) -> dict[str, Any]:
    return {"held_out": (str(folder / "text.jsonl"),)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (has_mask, "has a \\[MASK\\] already"),
        (empty_file, "empty.txt: the file is empty"),
        (short_file, "too little text: 108 bytes to learn from and 0 held out"),
        (lambda folder: lines(folder, "{text: two}", 9000), "broken.jsonl: the line at byte 144000 is not JSON"),
        (lambda folder: lines(folder, '{"text": "tw', 5000), "broken.jsonl: the line at byte 80000 is not JSON"),
        (lambda folder: lines(folder, '{"text": null}', 5000), "line at byte 80000 has no text in a field 'text'"),
        (held_out_twice, "cannot be both learnt from and held out"),
        (lambda folder: {"field": "body"}, "has no text in a field 'body': name the field with --field"),
        (lambda folder: {"files": (str(folder),)}, "this is a directory; name its files"),
        (lambda folder: {"files": (str(folder / "none.txt"),)}, "No such file"),
        (lambda folder: {"files": (str(folder / "a.jsonl.gz"),)}, r"a\.jsonl\.gz: this is compressed; decompress it"),
        (lambda folder: {"held_out": (str(folder / "b.NDJSON.zst"),)}, "this is compressed; decompress it"),
        (lambda folder: {"files": (str(folder / "books.TXT.gz"),)}, "this is compressed; decompress it"),
        (lambda folder: {"model": str(folder / "none")}, "no such directory"),
        (lambda folder: {"row_bytes": 5000}, "--row-bytes 5000: the model has 4096 positions"),
        (lambda folder: {"row_bytes": 0}, "--row-bytes 0: must be at least 1"),
        (lambda folder: {"held_out_bytes": 0}, "--held-out-bytes 0: must be at least 1"),
        (lambda folder: {"steps": None}, "give either --minutes or --steps"),
        (lambda folder: {"block_size": 1}, "at least 2 bytes"),
        (lambda folder: {"steps": None, "minutes": 0.0}, "--minutes 0.0: must be a number above 0"),
        (lambda folder: {"learning_rate": float("nan")}, "--learning-rate nan: must be a number above 0"),
    ],
)
def test_input_that_cannot_be_used_is_refused_before_training(
    change: Callable[[Path], dict[str, Any]], said: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises((OSError, ValueError), match=said):
        begin(settings(folder, **change(folder)), "tuned", tmp_path / "run", CPU)


def test_a_model_that_the_format_cannot_express_is_refused_before_training(folder: Path, tmp_path: Path) -> None:
    source = checkpoint.load(folder / "hf")
    odd = replace(source.config, encoder=replace(source.config.encoder, window=7))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError, match="cannot be saved: encoder.window"):
        patch.setattr(checkpoint, "load", lambda *a, **k: replace(source, config=odd))
        begin(settings(folder), "tuned", tmp_path / "run", CPU)


def test_a_run_keeps_its_settings_its_text_and_its_model(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(LINES))
    job = begin(settings(folder, files=(str(tmp_path / "text.txt"),)), "tuned", tmp_path / "run", CPU)
    job.tuning.save(tmp_path / "run")
    with pytest.raises(ValueError, match="holds a run already: --resume"):
        begin(settings(folder), "tuned", tmp_path / "run", CPU)
    with pytest.raises(ValueError, match="--row-bytes 64: the run in .* has 96, and keeps its settings"):
        resumed(tmp_path / "run", CPU, {"row_bytes": 64})
    with pytest.raises(ValueError, match="there is no run to resume"):
        resumed(tmp_path / "other", CPU, {})
    (tmp_path / "text.txt").write_text("".join(LINES).replace("sum", "som"))
    with pytest.raises(ValueError, match="not the text that the run"):
        resumed(tmp_path / "run", CPU, {})
    # The same but for one digit in the last twentieth, which is held out.
    (tmp_path / "text.txt").write_text("".join(LINES).replace("line 3850:", "line 3851:"))
    with pytest.raises(ValueError, match=r"text\.txt: not the held-out text that the run"):
        resumed(tmp_path / "run", CPU, {})


def test_held_out_files_must_be_those_that_the_run_began_with(folder: Path, tmp_path: Path) -> None:
    apart = tmp_path / "apart.txt"
    apart.write_text("".join(LINES[:400]))
    job = begin(settings(folder, held_out=(str(apart),)), "tuned", tmp_path / "run", CPU)
    job.tuning.save(tmp_path / "run")
    assert resumed(tmp_path / "run", CPU, {}).tuning.held_out == job.tuning.held_out
    apart.write_text("".join(LINES[:400]).replace("line 9:", "line 8:"))
    with pytest.raises(ValueError, match=r"apart\.txt: not the held-out text that the run in .* began with"):
        resumed(tmp_path / "run", CPU, {})


def test_a_run_resumes_from_another_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(job: Job) -> None:
        job.tuning.save(job.run)
        raise Stopped

    monkeypatch.setattr("training.finetune.train", stopped)
    write_meta(tmp_path / "meta", random_tensors(META_CONFIG, 0, torch.bfloat16), hub=True, beside=False)
    (tmp_path / "text.txt").write_text("".join(LINES))
    monkeypatch.chdir(tmp_path)
    given = ["--patcher", "meta/entropy_model", "--row-bytes", "64", "--held-out-bytes", "4000"]
    begun = ["finetune", "--model", "meta", "--out", "out", *given, "text.txt"]
    assert runner.invoke(app, begun).exit_code == 130
    monkeypatch.chdir(folder)
    run = tmp_path / "out.run"
    assert resumed(run, CPU, {}).tuning.settings.patcher == str(tmp_path / "meta" / "entropy_model")
    monkeypatch.chdir(tmp_path / "meta")
    again = ["finetune", "--resume", "--run", str(run), "--out", "out", "--patcher", "entropy_model"]
    assert runner.invoke(app, again).exit_code == 130


def test_the_command_to_go_on_with_has_the_flags_that_no_run_keeps(folder: Path, tmp_path: Path) -> None:
    def stopped(*arguments: Any, **more: Any) -> None:
        raise Stopped

    begun = ["finetune", "--model", str(folder / "hf"), "--out", str(tmp_path / "a model"), str(folder / "text.txt")]
    given = ["--device", "cuda", "--threads", "3", "--prompts", "0", "--prefixes", "7"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.finetune.finetune", stopped)
        found = [runner.invoke(app, [*begun, "--seed", "3", *more]) for more in (given, ["--prompts", "20"])]
    assert [result.exit_code for result in found] == [130, 130]
    again = [
        *["fastblt", "finetune", "--resume", "--run", str(tmp_path / "a model.run")],
        *["--out", str(tmp_path / "a model")],
    ]
    told = [shlex.split(result.stderr.removeprefix("stopped; go on with ")) for result in found]
    assert told == [[*again, *given], again]


def test_the_command_says_what_is_wrong_with_its_arguments(folder: Path, tmp_path: Path) -> None:
    model, words = str(folder / "hf"), str(folder / "text.txt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    assert "name the folder for the model" in fails("finetune", "--model", model, words, code=2)
    for unnamed in (".", "..", "/", "models/.."):
        said = fails("finetune", "--model", model, "--out", unnamed, words, code=2)
        assert f"{unnamed} has no name for the model: name a new folder" in said
    assert "name the model and the files" in fails("finetune", "--model", model, "--out", str(tmp_path / "new"), code=2)
    assert "--minutes or --steps" in fails(
        "finetune", "--model", model, "--out", str(tmp_path / "new"), "--steps", "9", "--minutes", "1", words, code=2
    )
    assert "is not an empty folder" in fails("finetune", "--model", model, "--out", str(tmp_path / "full"), words)
    for inside in ("new", "new/run", "full/../new/run"):
        given = ("--model", model, "--out", str(tmp_path / "new"), "--run", str(tmp_path / inside), words)
        assert f"{tmp_path / inside} must not lie in {tmp_path / 'new'}, which holds" in fails("finetune", *given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.cli.find_spec", lambda name: None if name == "tqdm" else object())
        said = fails("finetune", "--model", model, "--out", str(tmp_path / "new"), words)
        assert said == "fastblt: this needs tqdm, of the extra `train`: pip install tqdm\n"
    assert "no run to resume" in fails("finetune", "--resume", "--out", str(tmp_path / "new"))


def test_what_cannot_be_written_is_named(folder: Path, finished: Job, tmp_path: Path) -> None:
    """A limit of the process stands for a full disk."""
    run, out = tmp_path / "run", tmp_path / "out"
    finished.tuning.save(run)
    kept = (run / FILE).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"{run}/tuning\.safetensors\.new: not written: .*File too large"):
            finished.tuning.save(run)
        with pytest.raises(OSError, match=rf"{out}/.*/model\.safetensors: not written: .*File too large"):
            save(finished, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (run / FILE).read_bytes() == kept and not any(out.iterdir())


def test_a_diverged_fine_tuning_run_makes_no_model(folder: Path, tmp_path: Path) -> None:
    out, words = tmp_path / "out", str(folder / "text.txt")
    given = ["--model", str(folder / "hf"), "--out", str(out), "--rows", "1", "--row-bytes", "64", words]
    given += ["--held-out-bytes", "4000", "--steps", "8", "--learning-rate", "1e38"]
    result = runner.invoke(app, ["finetune", *given])
    said = result.stderr
    assert result.exit_code == 1 and "fastblt: phase blocks, step " in said
    assert f" is nan: nothing is saved any more, and {out}.run keeps the state after 2 steps in all" in said
    assert not out.exists()
    tensors = load_file(f"{out}.run/tuning.safetensors")
    assert tensors and all(tensor.isfinite().all() for tensor in tensors.values())
