"""The hand-over questions of the GPU check, in Triton's interpreter at toy sizes; cases that hang, break, are cut."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_check import handover
from benchmarks.gpu_check.handover import QUESTIONS, products, signals, stack, tile
from benchmarks.gpu_check.handover.question import NotHere, find
from benchmarks.gpu_check.handover.scale import Stack, TokenModel, scale_for
from benchmarks.gpu_check.handover.worker import Worker
from benchmarks.gpu_check.piece import Piece
from benchmarks.gpu_check.setting import Setting
from benchmarks.report import ROOT
from engine.checkpoint import PRESETS
from kernels.norm import rms_norm

TOY = scale_for("cpu", quick=True)


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_handover_question_is_measured_and_decided(name: str) -> None:
    question = import_module(QUESTIONS[name])
    cases = question.cases(TOY)
    rows, refused = [], []
    # A few; the whole list is what `make gpu-check` tries.
    for case in (*cases[:1], *cases[-3:]):
        try:
            rows.append({**case, **question.measure(TOY, case)})
        except NotHere as why:
            refused.append(str(why))
    assert all(row["us"] > 0 for row in rows)
    assert question.decide([]).startswith("not decided")
    full = [{**case, **dict.fromkeys(("us", "exposed us", "GB/s", "bytes/s"), 1.5)} for case in cases]
    assert not question.decide(full).startswith("not decided")
    assert "." in question.decide(full) and len(cases) == len({str(case) for case in cases})


def test_cases_that_need_a_gpu_are_refused_with_the_reason() -> None:
    found = {}
    for name, case in (
        ("T8", {"matrix": "global o", "weights": "bits by assembler"}),
        ("T7", {"by": "if node"}),
        ("T5", {"stack": "decoder", "as": "ring"}),
    ):
        with pytest.raises(NotHere) as why:
            import_module(QUESTIONS[name]).measure(TOY, case)
        found[name] = str(why.value)
    assert "assembler" in found["T8"] and "conditional nodes" in found["T7"] and "sm_90" in found["T5"]


def test_the_handover_sizes_are_those_of_the_presets() -> None:
    scale = scale_for("cuda", quick=False)
    for name, of in (("patcher", PRESETS["1b"].patcher), ("decoder", PRESETS["1b"].decoder)):
        assert scale.stacks[name] == Stack(of.num_layers, of.dim, of.ffn_dim, of.num_heads)
    of = PRESETS["1b"].global_
    assert scale.stacks["global"] == Stack(of.num_layers, of.dim, of.ffn_dim, of.num_heads)
    # Llama 3.2 1B: 1.24 billion parameters, its head and embedding being one.
    llama = TokenModel(16, 2048, 8192, 512, 128_256)
    assert scale.tokens == llama
    layer = llama.dim * (2 * llama.dim + 2 * llama.kv_dim) + 3 * llama.dim * llama.ffn
    assert llama.layers * layer + llama.vocab * llama.dim == pytest.approx(1.236e9, rel=1e-3)


@pytest.mark.parametrize(("width", "segments"), [(96, 8), (48, 4), (32, 1)])
def test_a_matrix_product_in_segments_equals_the_whole_product(width: int, segments: int) -> None:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(3, width, generator=generator).bfloat16()
    weight = (torch.randn(24, width, generator=generator) * width**-0.5).bfloat16()
    norm = torch.rand(width, generator=generator).bfloat16()
    for given, rows in ((None, x), (norm, rms_norm(x, norm, 1e-5))):
        y, alone = torch.empty(3, 24, dtype=torch.bfloat16), torch.empty(1, 24, dtype=torch.bfloat16)
        tile.product(x, weight, y, segments=segments, norm=given, overlaps=False)
        torch.testing.assert_close(y.float(), rows.float() @ weight.float().T, atol=0.02, rtol=0.01)
        tile.product(x[1:2], weight, alone, segments=segments, norm=given, overlaps=False)
        assert torch.equal(alone[0], y[1]), "a row's bits do not depend on the others"


def test_columns_beyond_the_tile_width_are_summed_in_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = {"SEGMENTS": 8, "WIDTH": 4, "ROUNDS": 3}
    assert [tile.segmented(width)["ROUNDS"] for width in (768, 1024, 2048, 2816, 5632)] == [1, 1, 1, 2, 3]
    monkeypatch.setattr(tile, "segmented", lambda width, segments: cut)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 88, generator=generator).bfloat16() for rows in (2, 8))
    y = torch.empty(2, 8, dtype=torch.bfloat16)
    tile.product(x, weight, y, overlaps=False)
    torch.testing.assert_close(y.float(), x.float() @ weight.float().T, atol=0.1, rtol=0.01)
    with pytest.raises(ValueError, match=r"matrix \(12, 88\)"):
        tile.product(x, torch.empty(12, 88), y, overlaps=False)


def test_all_numbers_of_float8_widen_exactly() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight = codes.where(~codes.float().isnan(), torch.zeros_like(codes)).repeat(8, 1)
    for start in range(0, 256, 16):
        one_hot = torch.eye(256)[start : start + 16].bfloat16()
        for widening, given in ((tile.CAST, weight), (tile.BITS, weight.view(torch.uint8))):
            y = torch.empty(16, 8, dtype=torch.bfloat16)
            tile.product(one_hot, given, y, widening=widening, overlaps=False)
            assert torch.equal(y.float(), weight.float()[:, start : start + 16].T)


def test_the_stack_kernel_equals_torch_whatever_other_rows_there_are() -> None:
    shape = TOY.stacks["decoder"]
    weights, x = stack.draw(TOY, shape), TOY.rows_of(3, shape.dim)
    for length in (5, stack.PAGE):
        run = stack.Run(TOY, shape, weights, x, length)
        found = run(apart=True).clone()
        torch.testing.assert_close(found, stack.expected(shape, weights, x, length), atol=0.05, rtol=0.05)
        assert torch.equal(run(apart=True), found)
        assert torch.equal(stack.Run(TOY, shape, weights, x[2:], length)(apart=True)[0], found[2])


def test_phases_that_do_not_wait_for_each_other_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deaf:
        def __getitem__(self, grid: object) -> Any:
            return lambda *_, **__: None

    monkeypatch.setattr(signals, "words_kernel", Deaf())
    with pytest.raises(RuntimeError, match="did not wait"):
        signals.measure(TOY, {"by": "words", "memory": "idle"})


def test_the_decision_about_segments_depends_on_the_time_saved() -> None:
    def rows(eight: float, one: float, now: float) -> list[dict[str, Any]]:
        cases = products.cases(TOY)
        return [{**c, "us": {8: eight, 1: one, 4: 1.0, products.NOW: now}[c["segments"]]} for c in cases]

    assert products.decide(rows(5.0, 8.0, 9.7)).count("build segments") == 2
    assert "less than was hoped" in products.decide(rows(9.0, 12.0, 9.7))
    assert "segments are not what helps" in products.decide(rows(5.0, 5.2, 9.7))
    assert find(rows(1, 2, 3), matrix="decoder o", segments=1)


@pytest.mark.slow
def test_the_handover_kernels_fit_a_device_and_prefetch_weights_before_they_wait() -> None:
    # Kernels that were defined for the interpreter cannot be compiled: another process defines them anew.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.kernels_static", "--handover", "--arch", "90"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "8 compiled; all fit" in done.stdout


BAD_CASES = """
import os, time
TITLE = "a bad one"
def cases(scale):
    return [{"how": how} for how in ("good", "hangs", "dies", "raises", "good again")]
def measure(scale, case):
    how = case["how"]
    if how == "hangs": time.sleep(60)
    if how == "dies": os._exit(9)
    if how == "raises": raise ValueError("no such thing")
    return {"us": 2.0}
def decide(rows):
    return f"{len(rows)} were measured."
"""


@pytest.fixture
def bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "bad_question.py").write_text(BAD_CASES)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "bad_question"


def test_a_case_that_hangs_or_crashes_does_not_stop_the_others(
    bad: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Worker.measure
    # The first answers of a new process take as long as its imports.
    monkeypatch.setattr(
        Worker,
        "measure",
        lambda self, module, scale, case, _: measure(self, module, scale, case, 1.0 if case["how"] == "hangs" else 60),
    )
    piece = Piece(tmp_path / "piece.json")
    handover.measure(Setting("cpu", True, tmp_path), piece, questions={"T0": bad})
    content = json.loads((tmp_path / "piece.json").read_text())
    assert [row["how"] for row in content["figures"]["T0"]] == ["good", "good again"]
    assert content["figures"]["decided"] == {"T0, a bad one": "2 were measured."}
    hangs, dies, raises = content["failures"]
    assert "no answer within 1 s" in hangs and "ended with 9" in dies and "ValueError: no such thing" in raises


def test_a_handover_budget_that_runs_out_keeps_the_figures_measured(bad: str, tmp_path: Path) -> None:
    piece = Piece(tmp_path / "piece.json")
    handover.measure(Setting("cpu", True, tmp_path), piece, budget_s=0.0, questions={"T0": bad})
    figures = json.loads((tmp_path / "piece.json").read_text())["figures"]
    assert "T0" not in figures and "'good'" in figures["left_out"] and "0 s were up" in figures["left_out"]


BARE = """
import importlib.util, sys
absent = {"msgspec", "pydantic", "safetensors", "pytest", "hypothesis", "rich", "tqdm"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in absent else find(name)
"""


def test_the_handover_part_needs_only_torch_and_triton(tmp_path: Path) -> None:
    """What a bare machine lacks cannot be imported; the command still comes to the part's first figures."""
    (tmp_path / "sitecustomize.py").write_text(BARE)
    done = subprocess.run(
        [
            *("sh", "deploy/gpu_check.sh", "--device", "cpu", "--quick"),
            *("--out", str(tmp_path), "--budget-s", "10.5"),
        ],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path), "PYTHON": sys.executable}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert "Only `handover` runs" in done.stderr and "msgspec" in done.stderr
    content = json.loads((tmp_path / "gpu_check-cpu-quick.json").read_text())
    assert list(content["parts"]) == ["handover"] and content["parts"]["handover"]["figures"]["T1"], done.stderr
