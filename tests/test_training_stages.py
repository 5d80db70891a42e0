"""A run in stages, on whatever machine: nothing is lost, nothing waits for the device, and little need be installed."""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from errno import ENOSPC
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine import checkpoint
from tests.other_device import DEVICE, other_device
from tests.test_layering import ROOT
from tests.test_training_run import CONFIG, CORPUS, SETTINGS
from training import corpus, export, loop, model
from training import state as states
from training import train as training
from training.loop import StageOver, Stopped
from training.metrics import read_metrics
from training.passes import COMPILE_SECONDS, Passes
from training.state import State
from training.train import MORE_TO_DO, train

TORCHS = {"filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "setuptools", "sympy"}
"""What torch imports."""
NEEDED = set(re.findall(r'^needed="(.*)"$', (ROOT / "deploy" / "gpu_train.sh").read_text(), re.M)[0].split())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[State, list[float]]:
    """A run that was never stopped, and its losses."""
    folder = tmp_path_factory.mktemp("whole")
    state = State.new(SETTINGS, CONFIG)
    train(state, CORPUS, folder)
    return state, [line["bits"] for line in read_metrics(folder)]


@pytest.fixture
def no_compiler_left() -> Iterator[None]:
    yield
    torch._dynamo.reset()
    torch._dynamo.config.suppress_errors = False


def test_stages_on_several_machines_equal_one_training_run(whole: tuple[State, list[float]], tmp_path: Path) -> None:
    folder, state = tmp_path / "0", State.new(SETTINGS, CONFIG)
    for stage in range(1, 20):
        try:
            train(state, CORPUS, folder, deadline=time.monotonic())
        except StageOver:
            # A copy of what this one left, and nothing else, goes to the next machine.
            folder = folder.rename(tmp_path / str(stage))
            state = State.load(folder, CONFIG)
            assert state.steps == stage, "a stage that has no time makes one step"
        else:
            break
    assert stage == 2 * (SETTINGS.steps or 0)
    assert len(list(folder.glob("metrics-*.jsonl"))) == stage
    assert [line["bits"] for line in read_metrics(folder)] == whole[1]
    for name, weight in whole[0].weights.items():
        assert torch.equal(State.load(folder, CONFIG).weights[name], weight), name


def test_a_training_stage_reserves_twice_the_time_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = State.save

    def slow(state: State, folder: Path) -> None:
        time.sleep(0.2)
        save(state, folder)

    monkeypatch.setattr(State, "save", slow)
    monkeypatch.setattr(loop, "SPARE_SECONDS", 0.1)
    deadline = time.monotonic() + 1.5
    with pytest.raises(StageOver):
        train(State.new(replace(SETTINGS, steps=10**6), CONFIG), CORPUS, tmp_path, deadline=deadline)
    assert -1.2 < time.monotonic() - deadline < 0
    assert State.load(tmp_path, CONFIG).steps == len(read_metrics(tmp_path)) > 1


def test_resuming_with_another_corpus_is_refused(tmp_path: Path) -> None:
    train(State.new(replace(SETTINGS, steps=1), CONFIG), CORPUS, tmp_path)
    other = replace(CORPUS, texts=(*CORPUS.texts[:-1], b"another\n"))
    assert replace(CORPUS, sources=("cpython-3.99.0",)).digest == CORPUS.digest != other.digest
    with pytest.raises(ValueError, match="began with another text .*: give the --corpus that it began with"):
        train(State.load(tmp_path, CONFIG), other, tmp_path)
    with pytest.raises(ValueError, match="learns from another text"):
        export.export(State.load(tmp_path, CONFIG), other, CORPUS, tmp_path, tmp_path / "out")


def test_a_training_step_on_a_device_reads_no_host_tensor_and_waits_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Fused AdamW is for devices that torch has kernels for; the one here runs each operation alone.
    adamw = torch.optim.AdamW
    monkeypatch.setattr("training.state.AdamW", lambda *a, **k: adamw(*a, **(k | {"fused": False, "foreach": False})))
    settings = replace(SETTINGS, steps=2, bf16=False)
    train(State.new(settings, CONFIG), CORPUS, tmp_path / "here")
    counts: list[int] = []
    with other_device() as waits:
        for name in ("_patcher_step", "_model_step"):
            counted(name, waits, counts, monkeypatch)
        train(State.new(settings, CONFIG, DEVICE), CORPUS, tmp_path / "there")
        resumed = State.load(tmp_path / "there", CONFIG, DEVICE)
        assert resumed.device == DEVICE and resumed.steps == 4
    assert counts == [0, 0, 1, 1], "only to learn how many patches there are"
    here, there = (State.load(tmp_path / name, CONFIG) for name in ("here", "there"))
    for name, weight in here.weights.items():
        torch.testing.assert_close(there.weights[name], weight, atol=1e-3, rtol=0)


def counted(name: str, waits: list[str], counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the steps that the function `name` gives count their waits."""
    make = getattr(training, name)

    def making(*arguments: object) -> loop.Step:
        step: loop.Step = make(*arguments)

        def counting(row: torch.Tensor, draw: torch.Generator) -> dict[str, torch.Tensor]:
            before = len(waits)
            figures = step(row, draw)
            counts.append(len(waits) - before)
            return figures

        return counting

    monkeypatch.setattr(training, name, making)


def test_the_simulated_device_refuses_host_tensors_and_counts_waits() -> None:
    with other_device() as waits:
        there = torch.ones(3, device=DEVICE)
        for mixed in (lambda: there + torch.ones(3), lambda: torch.cat([there, torch.ones(3)])):
            with pytest.raises(RuntimeError, match="on the host"):
                mixed()
        assert waits == []
        assert float(there.sum()) == 3.0 and there[there > 0].cpu().tolist() == [1.0] * 3
        assert waits == ["aten::_local_scalar_dense", "aten::index", "aten::_to_copy"]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text of a small library, as `python -m training.corpus` writes it."""
    folder = tmp_path_factory.mktemp("archive")
    for name, text in zip(CORPUS.names, CORPUS.texts, strict=True):
        (folder / name).write_bytes(text * 20)
    corpus.write_archive(folder / "corpus.tar.xz", folder)
    return folder / "corpus.tar.xz"


def command(run: Path, archive: Path, *more: str) -> list[str]:
    settings = f"--preset tiny --steps 1 --batch-bytes 256 --threads 1 --run {run} --corpus {archive}"
    return [*settings.split(), *more]


LITTLE = """
import sys
from importlib.metadata import packages_distributions

needed = set(sys.argv[1].split())
absent = {name for name, owners in packages_distributions().items() if not needed & {name, *owners}} - {"fastblt"}
absent -= {"server", "engine", "kernels", "clients", "training"}
assert {"matplotlib", "tqdm"} <= absent
sys.modules |= dict.fromkeys(absent)  # as if they were not installed

from training.train import main
arguments = sys.argv[2:]
print(main([*arguments, "--stage-minutes", "0.0001"]), main([*arguments, "--stage-minutes", "5", "--resume"]))
"""


def test_training_imports_few_packages_and_its_exit_code_tells_whether_to_resume(tmp_path: Path, archive: Path) -> None:
    arguments = [sys.executable, "-c", LITTLE, " ".join(NEEDED | TORCHS), *command(tmp_path, archive)]
    found = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == f"{MORE_TO_DO} 0"
    assert f"the stage is over; go on with --resume --run {tmp_path}" in found.stderr
    assert "finished; python -m training.export --run" in found.stdout


def test_an_unfinished_training_state_can_be_exported(
    tmp_path: Path, archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    arguments = ["--run", str(run), "--out", str(out), "--corpus", str(archive)]
    settings = replace(SETTINGS, preset="tiny", steps=2)
    for stage in range(3):
        state = State.load(run) if stage else State.new(settings)
        with pytest.raises(StageOver):
            train(state, corpus.corpora(archive)[0], run, deadline=time.monotonic())
        assert export.main(arguments) == (0 if stage == 2 else 1)
    assert "still trains its patcher" in capsys.readouterr().err
    loaded = checkpoint.load(out)
    for name, weight in state.weights.items():
        assert torch.equal(loaded.tensors[name], weight.to(torch.bfloat16)), name
    card = (out / "README.md").read_text()
    assert "The run is not finished: 50% of it is done." in card and "threads of a CPU" in card
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--resume", "state.json does not exist: there is no run in"),
        ("--device cuda", "--device cuda: torch finds no CUDA device"),
        ("--out x --stage-minutes 1", "--out is not for stages"),
        ("--stage-minutes 0", "invalid number of minutes above 0 value: '0'"),
        ("--batch-bytes 0", "invalid number above 0 value: '0'"),
        ("--corpus x.tar.xz", "No such file or directory: 'x.tar.xz'"),
        ("--compile maybe", "invalid choice: 'maybe'"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="has what is asked for")
def test_wrong_training_flags_are_refused_at_once(
    tmp_path: Path, archive: Path, capsys: pytest.CaptureFixture[str], more: str, message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        training.main(command(tmp_path, archive, *more.split()))
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_keeps_its_settings_and_a_new_run_does_not_overwrite_it(
    tmp_path: Path, archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert training.main(command(tmp_path, archive, "--stage-minutes", "0.0001")) == MORE_TO_DO
    before = (tmp_path / "state.json").read_text()
    for more, message in (
        ((), "holds a run already: --resume goes on with it; to begin anew, delete it"),
        (("--resume", "--batch-bytes", "512"), f"--batch-bytes 512: the run in {tmp_path} has 256"),
        (("--resume", "--corpus", "other"), "No such file"),
    ):
        with pytest.raises(SystemExit, match="2"):
            training.main(command(tmp_path, archive, *more))
        assert message in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "state.json").read_text() == before


def test_a_stopped_run_names_the_flags_to_give_again(
    tmp_path: Path, archive: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: object) -> None:
        raise Stopped

    monkeypatch.setattr(training, "train", stopped)
    monkeypatch.setattr(training, "chosen_device", lambda name: torch.device("cpu"))
    run = tmp_path / "a run"
    arguments = ["--run", str(run), "--preset", "tiny", "--steps", "1", "--corpus", str(archive), "--device", "cuda"]
    assert training.main([*arguments, "--stage-minutes", "9", "--compile", "auto", "--threads", "1"]) == 130
    assert training.main([*arguments, "--out", str(tmp_path / "out"), "--compile", "off"]) == 130
    again = shlex.join(["--resume", "--run", str(run)])
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("stopped")] == [
        f"stopped; go on with {again} --device cuda --stage-minutes 9.0 --corpus {archive} --threads 1",
        f"stopped; go on with {again} --out {tmp_path / 'out'} --device cuda --corpus {archive} --compile off",
    ]


def test_a_full_disk_ends_a_run_with_its_last_state_and_the_flags_to_go_on(
    tmp_path: Path, archive: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, written = tmp_path / "run", states.write_parts

    def full(*arguments: Any) -> Any:
        if (run / "state.json").exists():
            raise OSError(ENOSPC, os.strerror(ENOSPC), str(run))
        return written(*arguments)

    monkeypatch.setattr(states, "write_parts", full)
    assert training.main(command(run, archive, "--stage-minutes", "100000")) == 1
    again = shlex.join(["--resume", "--run", str(run), "--stage-minutes", "100000.0"])
    said = f"No space left on device: '{run}'; the last saved state is complete: go on with {again} "
    assert said in capsys.readouterr().err
    assert State.load(run).steps == 0

    monkeypatch.setattr(states, "write_parts", written)
    assert training.main(["--resume", *command(run, archive, "--stage-minutes", "100000")]) == 0
    assert State.load(run).steps > 0

    out = tmp_path / "out"
    out.write_text("a file, so no folder for a model")
    finished = ["--resume", *command(run, archive, "--out", str(out))]
    assert training.main(finished) == 1
    again = shlex.join(["--resume", "--run", str(run), "--out", str(out)])
    assert f"'{out}'; the run is finished: write its model with {again} " in capsys.readouterr().err

    def refused(*arguments: Any) -> None:
        raise OSError(ENOSPC, os.strerror(ENOSPC), str(run))

    monkeypatch.setattr(states, "write_parts", refused)
    other = tmp_path / "other"
    assert training.main(command(other, archive, "--stage-minutes", "100000")) == 1
    assert "go on with" not in capsys.readouterr().err, "nothing was saved to go on with"


def double(row: torch.Tensor) -> torch.Tensor:
    return 2 * row


def test_a_training_pass_is_compiled_when_time_and_compiler_allow(
    no_compiler_left: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = torch.ones(2, 5, requires_grad=True)

    def attempt(function: training.Pass) -> None:
        function(row).sum().backward()

    assert Passes("auto").choose(double, row.shape, attempt) is double, "not on a CPU"
    assert Passes("off").choose(double, row.shape, attempt) is double
    late = Passes("on", deadline=time.monotonic() + COMPILE_SECONDS - 1)
    assert late.choose(double, row.shape, attempt) is double
    assert "double of 2 rows of 4 bytes: not compiled, the stage ends soon" in capsys.readouterr().err
    # What the compiler made is real, but that it is not C++, which takes it half a minute.
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compiler(function, backend="aot_eager"))
    saved: list[bool] = []
    passes = Passes("on", before=lambda: saved.append(True))
    compiled = passes.choose(double, row.shape, attempt)
    assert saved == [True], "before minutes that may be lost"
    assert compiled is not double and torch.equal(compiled(row), double(row)) and passes.seconds > 0
    assert "compiled in" in capsys.readouterr().err
    torch._dynamo.reset()
    torch._dynamo.config.suppress_errors = False
    monkeypatch.setattr(torch, "compile", lambda function: compiler(function, backend=broken))
    assert Passes("on").choose(double, row.shape, attempt) is double
    assert "not compiled, the compiler failed" in capsys.readouterr().err


@pytest.mark.slow
def test_a_pass_is_compiled_once_for_any_number_of_patches(
    no_compiler_left: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, compiled = torch.compile, 0

    def counted(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        nonlocal compiled
        compiled += 1
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function: compiler(function, backend=counted))
    state = State.new(replace(SETTINGS, blocks_from=0.0, block_warm_up=0.0, own_share=1.0), CONFIG)
    rows = [CORPUS.rows(np.random.default_rng(seed), 2, 64) for seed in range(4)]
    with torch.no_grad():
        state.weights["model.patcher.lm_head.weight"].normal_(generator=torch.Generator().manual_seed(0))
        entropies = [model.entropies(CONFIG, state.weights, row[:, :-1]) for row in rows]
    state.set_threshold(float(torch.cat(entropies).median()))
    numbers = {model.patch(state.config.patching, entropy).starts.shape[1] for entropy in entropies}
    step = training._model_step(state, Passes("on"))
    found = []
    for seed, row in enumerate(rows):
        step(row, torch.Generator().manual_seed(seed))
        found.append(compiled)
    assert len(numbers) > 1 and found == [2] * 4, "the text and its blocks, before the first step"


def broken(graph: object, inputs: object) -> None:
    raise NotImplementedError("no such operation")
