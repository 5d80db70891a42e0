"""`fastblt eval`: bits per byte of files equal those of a plain full forward, however the files are cut and batched."""

import io
import json
import math
import random
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

from engine.checkpoint import PRESETS, load, random_tensors, save
from engine.config import BOS_ID, BYTE_OFFSET, EngineConfig, ModelConfig
from engine.scoring import score
from server import scoring
from server.cli import app
from server.texts import Texts
from tests import reference
from tests.engines import make_engine, save_ours
from tests.models import HF_MODELS, OUR_MODELS, hf_logits
from tests.test_checkpoint_formats import META_CONFIG, write_meta
from tests.test_cli import fails
from training import evaluate as training_evaluate

runner = CliRunner()


def some_bytes(count: int, seed: int = 0) -> bytes:
    """From a small alphabet, so that n-grams repeat, with bytes that are no text among them."""
    return bytes(random.Random(seed).choices([*range(100, 120), 0, 127, 196, 255, 10], k=count))


def evaluate(model: Path, *files: Path, context: int = 64, stride: int | None = None, **choices: object):
    config = EngineConfig(str(model), prefix_cache=False, cache_bytes=64 << 20, page_size=16, **choices)
    return scoring.evaluate(config, Texts(files, context, stride or context))


def ids_of(data: bytes) -> list[int]:
    return [BOS_ID, *(byte + BYTE_OFFSET for byte in data)]


def nats(logits: Tensor, ids: list[int], first: int = 1) -> float:
    """Of ids[first:], under the rows before them."""
    return sum(-float(logits[place - 1].log_softmax(-1)[ids[place]]) for place in range(first, len(ids)))


def cut(data: bytes, context: int) -> list[list[int]]:
    return [ids_of(data[i : i + context]) for i in range(0, len(data), context)]


def starts_of(config: ModelConfig, tensors: dict[str, Tensor], ids: list[int]) -> list[int]:
    return reference.patch_starts(config.patching, reference.entropies(config, tensors, ids))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "text.bin"
    path.write_bytes(some_bytes(150))
    return path


def test_the_time_of_xz_is_none_of_scoring(tiny: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        """Takes a thousand seconds for each slice."""

        late = 0.0

        def __init__(self, preset: int) -> None:
            pass

        def compress(self, data: bytes) -> bytes:
            Slow.late += 1000.0
            return b""

        def flush(self) -> bytes:
            return b""

    real = time.perf_counter
    monkeypatch.setattr(scoring.lzma, "LZMACompressor", Slow)
    monkeypatch.setattr(scoring, "time", SimpleNamespace(perf_counter=lambda: real() + Slow.late))
    assert 0 < evaluate(tiny, file).seconds < 500 and Slow.late == 3000.0


@pytest.mark.parametrize("name", ["plain", "monotonic", "threshold-add", "fast-blt", "meta"])
def test_bits_per_byte_equal_a_plain_full_forward(name: str, tmp_path: Path, file: Path) -> None:
    folder = tmp_path / "model"
    if name == "meta":
        write_meta(folder, random_tensors(META_CONFIG, 0), hub=True, beside=False)
    else:
        save_ours(folder, OUR_MODELS[name]())
    loaded = load(folder)
    config, tensors = loaded.config, loaded.tensors
    result = evaluate(folder, file)
    slices = cut(file.read_bytes(), 64)
    expected = sum(nats(reference.forward(config, tensors, ids), ids) for ids in slices)
    assert result.bits_per_byte == pytest.approx(expected / math.log(2) / 150, abs=1e-4)
    starts = [starts_of(config, tensors, ids) for ids in slices]
    assert result.patches == sum(1 <= s < len(ids) for own, ids in zip(starts, slices, strict=True) for s in own)
    assert result.mean_patch == 150 / result.patches
    # What the stages ran: every byte and BOS, and each patch that was closed.
    rows = {stage: reads.rows for stage, reads in result.stages.items()}
    assert rows["patcher"] == rows["encoder"] == rows["decoder"] == 150 + len(slices)
    assert rows["global"] == sum(len(own) - 1 for own in starts)
    weights = make_engine(folder).parts.stage_bytes.weights
    assert all(reads.weight_bytes == reads.passes * weights[stage] for stage, reads in result.stages.items())
    assert all(0 < reads.passes <= reads.rows and reads.cache_bytes > 0 for reads in result.stages.values())


@pytest.mark.parametrize("name", ["k2", "every-byte"])
def test_bits_per_byte_equal_hugging_faces(name: str, tmp_path: Path, file: Path) -> None:
    model = HF_MODELS[name]()
    model.save_pretrained(tmp_path / "model")
    expected = sum(nats(hf_logits(model, ids), ids) for ids in cut(file.read_bytes(), 64))
    result = evaluate(tmp_path / "model", file)
    assert result.bits_per_byte == pytest.approx(expected / math.log(2) / 150, abs=1e-4)
    assert name != "every-byte" or result.mean_patch == 1


def test_overlapping_slices_give_context_and_score_each_byte_once(tmp_path: Path, file: Path) -> None:
    config, tensors = OUR_MODELS["fast-blt"]()
    save(tmp_path / "model", config, tensors)
    data, expected, patches = file.read_bytes(), 0.0, 0
    for begin in range(0, 150 - 24, 40):
        ids, known = ids_of(data[begin : begin + 64]), 24 if begin else 0
        expected += nats(reference.forward(config, tensors, ids), ids, 1 + known)
        patches += sum(1 + known <= start < len(ids) for start in starts_of(config, tensors, ids))
    result = evaluate(tmp_path / "model", file, stride=40)
    assert (result.estimate.bytes, result.patches) == (150, patches)
    assert result.bits_per_byte == pytest.approx(expected / math.log(2) / 150, abs=1e-4)
    assert result.stages["patcher"].rows > 150 + result.estimate.slices


def test_a_score_does_not_depend_on_the_batch_or_on_the_number_of_rows_in_a_step(tiny: Path, file: Path) -> None:
    texts = list(Texts((file,), 24, 24))
    found = []
    for choices in ({"max_sequences": 1}, {"max_step_rows": 7}, {"max_sequences": 64}):
        done = {text.data: scored for text, scored in score(make_engine(tiny, **choices), texts)}
        found.append([done[text.data] for text in texts])
    assert len(texts) == 7 and found[0] == found[1] == found[2]


def test_scores_of_several_files_add_up(tiny: Path, tmp_path: Path, file: Path) -> None:
    (tmp_path / "other").write_bytes(some_bytes(31, 1))
    both = evaluate(tiny, file, tmp_path / "other")
    alone = [evaluate(tiny, path) for path in (file, tmp_path / "other")]
    for one, own in zip(both.files, alone, strict=True):
        assert (one.bits_per_byte, one.mean_patch) == (own.bits_per_byte, own.mean_patch)
    assert both.estimate.nats == pytest.approx(sum(one.estimate.nats for one in alone))
    assert "other" in scoring.render(both) and "other" not in scoring.render(alone[0])


# Slices.


@given(
    st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=3),
    st.integers(1, 12),
    st.data(),
    st.none() | st.integers(1, 50),
)
def test_every_byte_is_scored_once_with_the_available_context(
    files: list[bytes], context: int, data: st.DataObject, most: int | None
) -> None:
    stride = data.draw(st.integers(1, context))
    paths = tuple(Path(str(number)) for number in range(len(files)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.texts._open", lambda path: io.BytesIO(files[int(str(path))]))
        slices = list(Texts(paths, context, stride, most))
    new = [b"".join(s.new for s in slices if s.file == number) for number in range(len(files))]
    whole = b"".join(files)[:most]
    assert b"".join(new) == whole
    assert all(text.startswith(part) for text, part in zip(files, new, strict=True))
    for s in slices:
        assert 0 < s.num_new <= len(s.data) <= context and s.ids == ids_of(s.data)
    for before, s in pairwise(slices):
        if s.file == before.file:
            assert s.num_known == context - stride and s.data[: s.num_known] == before.data[stride:]
        else:
            assert s.num_known == 0


def test_the_number_of_bytes_to_score_is_known_unless_read_from_a_pipe(tmp_path: Path, file: Path) -> None:
    assert Texts((file, file), 8, 8).check() == 300
    assert Texts((file, file), 8, 8, 200).check() == 200
    assert Texts((file, Path("-")), 8, 8).check() is None
    assert Texts((file, Path("-")), 8, 8, 200).check() == 200


# The interval.


def test_the_95_percent_interval_covers_the_mean_as_often_as_stated() -> None:
    """Slices whose bits differ far more than their bytes would if they were independent."""
    draw, hit, runs = random.Random(0), 0, 1000
    for _ in range(runs):
        estimate = scoring.Estimate()
        for _ in range(12):
            num_bytes = draw.randint(100, 1000)
            estimate.add(num_bytes * draw.gauss(2.0, 0.5), num_bytes)
        interval = estimate.interval
        assert interval
        hit += interval[0] <= 2.0 <= interval[1]
    assert hit / runs == pytest.approx(0.95, abs=0.03)


def test_the_confidence_interval_equals_the_textbook_formula() -> None:
    values, estimate = [1.5, 2.5, 2.0, 3.0, 1.0, 2.6], scoring.Estimate()
    for value in values:
        estimate.add(100 * value, 100)
    mean = sum(values) / 6
    # Equal slices: the mean of a sample, and t of 5 degrees of freedom.
    half = 2.5706 * math.sqrt(sum((v - mean) ** 2 for v in values) / 5 / 6)
    assert estimate.interval == pytest.approx((mean - half, mean + half), rel=0.01)


def test_few_slices_give_no_confidence_interval(tiny: Path, file: Path) -> None:
    result = evaluate(tiny, file)
    assert result.interval is None and "no interval: 3 of the 5 slices" in scoring.render(result)


# The command.


def test_eval_with_json_prints_one_object(tiny: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["eval", "--model", str(tiny), "--context=16", "--max-bytes=100", "--json"]
    found = json.loads(runner.invoke(app, [*flags, str(file)]).stdout)
    assert found["bytes"] == 100 and found["slices"] == 7 and found["interval"][0] < found["bits_per_byte"]
    assert set(found["stages"]) == {"patcher", "encoder", "global", "decoder"}
    assert [f["file"] for f in found["files"]] == [str(file)]
    piped = json.loads(runner.invoke(app, [*flags, "-"], input=file.read_bytes()).stdout)
    assert piped["bits_per_byte"] == found["bits_per_byte"]
    # `--text FILE...`: the first belongs to the flag, the others follow.
    named = json.loads(runner.invoke(app, [*flags, "--text", str(file), str(file)]).stdout)
    assert [f["file"] for f in named["files"]][0] == str(file) and named["bits_per_byte"] == found["bits_per_byte"]
    finer = json.loads(runner.invoke(app, [*flags, "--patching-threshold=-1", str(file)]).stdout)
    assert finer["mean_patch"] == 1 < found["mean_patch"]
    import lzma

    assert found["xz_bits_per_byte"] == 8 * len(lzma.compress(file.read_bytes()[:100], preset=9)) / 100


def test_eval_prints_tables(tiny: Path, file: Path) -> None:
    done = runner.invoke(app, ["eval", "--model", str(tiny), "--context=16", "--stride=8", str(file)])
    assert done.exit_code == 0, done.output
    result = evaluate(tiny, file, context=16, stride=8)
    assert f" {result.bits_per_byte:.4f}   95% interval" in done.stdout
    assert "over 18 slices" in done.stdout and "8 bytes apart" in done.stdout
    assert f"{result.stages['global'].rows:,}" in done.stdout


def test_eval_explains_in_one_line_why_it_cannot_score(tiny: Path, tmp_path: Path, file: Path) -> None:
    (tmp_path / "empty").touch()
    model = ("eval", "--model", tiny)
    assert fails(*model, file, none := tmp_path / "none") == f"fastblt: {none}: No such file or directory\n"
    assert "empty: the file is empty" in fails(*model, file, tmp_path / "empty")
    assert "this is a directory" in fails(*model, tmp_path)
    assert "5000 bytes and BOS make 5001 ids; this model and its caches hold 4096" in fails(
        *model, file, "--context=5000"
    )
    assert "--stride: 9 must be from 1 to --context, which is 8" in fails(*model, file, "--context=8", "--stride=9")
    assert "--context: 0 must be 1" in fails(*model, file, "--context=0")
    assert "--max-bytes: 0 must be 1" in fails(*model, file, "--max-bytes=0")
    assert "no such directory" in fails("eval", "--model", tmp_path / "none", file)
    assert "Invalid value for FILE: name at least one file" in fails(*model, code=2)


def test_the_error_about_too_many_patches_names_the_context_flag(tmp_path: Path, file: Path) -> None:
    config, tensors = OUR_MODELS["plain"]()
    save(tmp_path / "m", replace(config, global_=replace(config.global_, max_positions=16)), tensors)
    with pytest.raises(ValueError, match="more than 16 patches.*: make --context smaller than 128"):
        evaluate(tmp_path / "m", file, context=128)


def test_progress_is_printed_in_lines_without_a_terminal(
    tiny: Path, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("server.progress.INTERVAL", 0.0)
    evaluate(tiny, file)
    assert capsys.readouterr().err.splitlines()[-1] == "scoring: 150 of 150 bytes"


def test_progress_is_a_bar_on_a_terminal(
    tiny: Path, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    evaluate(tiny, file)
    said = capsys.readouterr().err
    assert "scoring" in said and "150/150 bytes" in said and "\r" in said


def test_training_evaluate_refuses_a_model_without_mask_id_and_suggests_eval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(PRESETS["tiny"], decoder_input="encoder", mask_id=None, block_size=None)
    save(tmp_path, config, random_tensors(config, 0))
    assert training_evaluate.main([str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1 and "`fastblt eval --model FOLDER FILE...`" in said.err
