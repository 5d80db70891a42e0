"""`fastblt check`: a machine that is fit passes, and every fault that is planted is found and named."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from engine.check import machine, run, speed, texts, twins
from engine.check.cases import COMPOSED, OPERATIONS, own
from engine.check.compare import apart
from engine.check.report import FITS_IN_CACHES, Report
from engine.check.speed import Speed
from engine.check.twins import Trial, faults
from engine.config import EngineConfig
from engine.costs import bandwidth
from engine.installed import installed
from kernels import native
from kernels.dispatch import Kernels, NativeKernels, TritonKernels
from kernels.stack import CrossKvWeights, KvPages
from server.cli import app
from tests.operands import CPU
from tests.operands import TRITONS as DEVICE

NANO = Path(__file__).parents[1] / "models" / "nano"
FLOAT32 = torch.float32
CHEAP = [
    "linear, norm, gated", "linear, float8", "linear, some rows, wide", "qkv", "keys_values", "read_slots",
    "patch_max", "closing", "latent_places", "boundaries", "unmask", "argmax", "accepted",
]  # fmt: skip
"""What the interpreter runs in a few hundredths of a second."""


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that takes a second."""
    monkeypatch.setattr(twins, "ROW_COUNTS", (2,))
    monkeypatch.setattr(twins, "DTYPES", (FLOAT32,))
    monkeypatch.setattr(texts, "NEW_BYTES", 8)
    monkeypatch.setattr(speed, "MOST_SECONDS", 0.02)
    monkeypatch.setattr(speed, "WARM_SECONDS", 0.02)
    monkeypatch.setattr(bandwidth, "PROBED_BYTES", {"cpu": 1 << 20})


def test_every_operation_has_a_case() -> None:
    operations = {name for name, value in vars(Kernels).items() if isinstance(value, staticmethod)}
    assert {name.partition(",")[0] for name in OPERATIONS} == operations | {*COMPOSED}
    # Parts of `settle`, which Triton has as one kernel.
    assert own(TritonKernels()) == [name for name in OPERATIONS if name not in ("confidence_and_entropy", "unmask")]


@pytest.mark.parametrize("name", own(NativeKernels()))
def test_the_cpus_kernels_pass(name: str) -> None:
    for dtype in twins.DTYPES:
        assert not [*faults(Trial(name, dtype, 3), NativeKernels(), CPU)]


@pytest.mark.parametrize("name", CHEAP)
def test_triton_kernels_pass(name: str) -> None:
    assert not [*faults(Trial(name, FLOAT32, 2), TritonKernels(), DEVICE)]


class OneBit(NativeKernels):
    """A linear whose last bit is wrong in calls with 16 rows."""

    @staticmethod
    def linear(x: Tensor, *args: Any, **how: Any) -> Tensor:  # type: ignore[override]
        found = native.linear(x, *args, **how)
        if len(x) == 16:
            found.view(torch.int32)[5, 3] ^= 1
        return found


def test_a_bit_that_depends_on_the_number_of_rows_is_found() -> None:
    (found,) = faults(Trial("linear, norm", FLOAT32, 16), OneBit(), CPU)
    assert found.startswith("linear, norm (float32, 16 rows), shape 16 x 70: row 5 alone differs from itself")
    assert 0 < float(found.split()[-1]) < 1e-6
    assert not [*faults(Trial("linear, norm", FLOAT32, 3), OneBit(), CPU)]


def test_values_that_are_not_torchs_are_found() -> None:
    class Wrong(NativeKernels):
        @staticmethod
        def entropy(logits: Tensor) -> Tensor:
            return native.entropy(logits) + 0.25

        @staticmethod
        def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
            ids, values = native.argmax(logits)
            return ids + 1, values

    (found,) = faults(Trial("entropy", FLOAT32, 3), Wrong(), CPU)
    assert found == "entropy (float32, 3 rows), shape 3: differs from torch's by up to 0.25"
    (found,) = faults(Trial("argmax", FLOAT32, 1), Wrong(), CPU)
    assert found == "argmax (float32, 1 row), output 1 of 2, shape 1: differs from torch's by up to 1"


def test_a_kernel_that_writes_elsewhere_is_found() -> None:
    class Wrong(TritonKernels):
        @staticmethod
        def keys_values(
            x: Tensor, weights: CrossKvWeights, cache: KvPages, page: Tensor, offset: Tensor, *states: Any
        ) -> None:
            TritonKernels.keys_values(x, weights, cache, page, offset, *states)
            cache[0][1 - page[0].clamp(max=1), 1, 3, 7] += 2.0

    found = [*faults(Trial("keys_values", FLOAT32, 1), Wrong(), DEVICE)]
    assert found == ["keys_values (float32, 1 row), output 2 of 6, shape 1: differs from torch's by up to 1"]


@pytest.mark.parametrize(
    ("found", "expected", "exact", "largest"),
    [
        ([1.0, torch.nan], [1.0, torch.nan], True, None),
        ([1.0, torch.nan], [1.0, torch.nan], False, None),
        ([1.0], [1.0 + 1e-6], False, None),
        ([1.0], [1.5], True, 0.5),
        ([1.0, torch.nan], [1.0, 2.0], False, torch.inf),
        ([1.0, 2.0], [1.0], True, torch.inf),
    ],
)
def test_results_are_equal_or_close(
    found: list[float], expected: list[float], exact: bool, largest: float | None
) -> None:
    assert apart(torch.tensor(found), torch.tensor(expected), exact=exact) == largest


@pytest.mark.usefixtures("little")
def test_a_fit_machine_passes() -> None:
    done = CliRunner().invoke(app, ["check", "--device", "cpu", "--json", "--seconds", "60"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["fit"] and found["verdict"].startswith("Fit: ") and not found["wrong"]
    assert found["trials_done"] == found["trials"] == len(own(NativeKernels()))
    names = ["blt", "blt-s", "blt-dv", "auto"]
    assert [(c["what"], c["dtype"]) for c in found["texts"]] == [
        *((name, dtype) for dtype in ("bfloat16", "float32") for name in names),
        ("blt beside torch's kernels", "float32"),
    ]
    assert all((c["texts"], c["compared"], c["wrong"]) == (8, 64, []) for c in found["texts"])
    runs = [(s["decoder"], s["sequences"]) for s in found["speeds"]]
    assert runs == [("blt", 1), ("blt-s", 1), ("blt-d", 1), ("blt-dv", 1), ("blt", 16)]
    for s in found["speeds"]:
        assert s["bytes_per_second"] > 0
        of_weights = s["bytes_read_per_second"] / s["bytes_per_second"] / found["weight_bytes"]
        assert 0.02 < of_weights < 1.1, "a byte reads the decoder, a patch the rest"
        assert s["of_copy"] == pytest.approx(s["bytes_read_per_second"] / found["copy"])


@pytest.mark.usefixtures("little")
def test_a_text_that_differs_is_named_with_its_first_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    generate = texts.generate

    def wrong(*how: Any) -> texts.Texts:
        found = generate(*how)
        for name in found:
            if name == "blt-s: prompt 2, sampled":
                found[name][5:7] = [ord("?") + 4, 300]
        return found

    monkeypatch.setattr(texts, "generate", wrong)
    monkeypatch.setattr(speed, "runs", lambda engine: [])
    done = CliRunner().invoke(app, ["check", str(NANO), "--device", "cpu", "--dtype", "bfloat16", "--seconds", "60"])
    assert done.exit_code == 1
    last = " ".join(done.stdout.rpartition("\n\n")[2].split())
    assert last.startswith("Not fit: one thing is wrong: blt-s, bfloat16: prompt 2, sampled: byte 5 is b'?' and should")


@pytest.mark.usefixtures("little")
def test_a_kernel_that_raises_is_named_and_the_check_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Tensor:
        raise RuntimeError("no image for this device\nat line 7")

    monkeypatch.setattr(NativeKernels, "unmask", staticmethod(broken))
    report = run.check(EngineConfig(str(NANO)), (), 60.0, lambda *_: None)
    # `settle` is made of it.
    said = "(float32, 2 rows): raised RuntimeError: no image for this device"
    assert report.wrong == [f"{name} {said}" for name in ("unmask", "settle")]
    assert report.trials_done == len(own(NativeKernels())) and not report.fit


def test_what_the_time_did_not_reach_is_said() -> None:
    told: list[tuple[str, int, int]] = []
    report = run.check(EngineConfig(str(NANO)), ("bfloat16",), 0.0, lambda *step: told.append(step))
    assert report.fit and not report.trials_done
    count = len(twins.trials(NativeKernels()))
    (said,) = report.notes
    assert said.startswith(f"the time was up before {count} of {count} trials of kernels, the end of 4 comparisons")
    assert ", the speeds: a larger --seconds" in said
    assert report.verdict.startswith("Fit, as far as was checked: only versions and the device. But the time was up")
    assert all(0 <= done < total for _, done, total in told)


def test_a_model_or_device_that_is_not_there_is_refused() -> None:
    done = CliRunner().invoke(app, ["check", "/nowhere"])
    assert done.exit_code == 1 and "/nowhere" in done.stderr
    if not torch.cuda.is_available():
        done = CliRunner().invoke(app, ["check", "--device", "cuda"])
        assert done.exit_code == 1 and "finds no CUDA device" in done.stderr


HERE = machine.Machine(
    "cuda", "NVIDIA T", 80 << 30, (9, 0), "570.1", "13.0",
    {"fastblt": "1", "python": "3.12.1", "torch": "2.11.0+cu130", "triton": "3.6.0"}, "triton",
)  # fmt: skip


def test_what_is_outside_of_what_is_supported_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not machine.unsupported(HERE) and not machine.slower(HERE)
    old = replace(HERE, compute_capability=(7, 5), versions={"python": "3.10.2", "torch": "2.9.1", "triton": "3.5.1"})
    said = machine.unsupported(old)
    assert [what.split()[0] for what in said] == ["python", "torch", "triton", "NVIDIA"]
    assert "2.9.1 is too old: 2.11" in said[1] and "7.5: the kernels need 8.0" in said[3]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (said,) = machine.unsupported(replace(HERE, device="cpu", compute_capability=None))
    assert "driver (570.1), but torch 2.11.0+cu130 finds no CUDA device: it was built for CUDA 13.0" in said
    (said,) = machine.slower(replace(HERE, device="cpu", kernels="torch"))
    assert "the kernels are torch's (--kernels torch)" in said
    monkeypatch.setattr("engine.installed.available.library", lambda: None)
    installed.cache_clear()
    (said,) = machine.slower(replace(HERE, device="cpu", kernels="torch"))
    installed.cache_clear()
    assert "CPU kernels were not compiled" in said
    file = tmp_path / "version"
    assert machine.driver(file) is None
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.14  Release Build\nGCC version: 12.2\n"
    )
    assert machine.driver(file) == "550.54.14"


def test_what_is_slow_is_said_and_is_no_failure() -> None:
    report = Report(
        HERE, "m", copy=1e12, product=4e11, weight_bytes=FITS_IN_CACHES, speeds=[Speed("blt", 1, 9, 1e11, 0.1)]
    )
    report.judge_speed()
    assert report.fit
    assert "But slow: a product with one row reads its matrix at 40% of a copy's speed." in report.verdict
    assert "And slow: blt alone reads at 10% of a copy's speed." in report.verdict
