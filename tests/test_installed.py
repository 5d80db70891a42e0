"""What is installed, as the command, the server and its log tell it."""

import platform
import runpy
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest
import torch
from typer.testing import CliRunner

from engine import commit as commits
from engine.config import KernelName
from engine.installed import Installed, installed
from kernels import available, native
from kernels.dispatch import choose_kernels
from server.cli import app
from tests.conftest import ROOT

V3 = "fpu sse4_2 avx avx2 bmi1 bmi2 f16c fma abm movbe"
V4 = f"{V3} avx512f avx512bw avx512cd avx512dq avx512vl"


def git(folder: Path, *arguments: str) -> str:
    user = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    return subprocess.check_output(["git", *user, *arguments], cwd=folder, text=True).strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """One commit with one file."""
    (tmp_path / "file").write_text("a")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "a")
    return tmp_path


class TestCommit:
    """Of a checkout, and of nothing else."""

    def test_the_commit_is_the_head_of_git(self, repository: Path) -> None:
        head = git(repository, "rev-parse", "HEAD")
        git(repository, "tag", "v1")
        assert commits.commit_of(repository) == head[:12]
        (repository / "file").write_text("b")
        assert commits.commit_of(repository) == f"{head[:12]}-dirty"

    def test_the_commit_of_a_work_tree_is_its_own(self, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        git(repository, "worktree", "add", "-q", "beside")
        head = git(repository, "rev-parse", "HEAD")
        # As where a hook of another repository starts the server.
        monkeypatch.setenv("GIT_DIR", "/elsewhere")
        assert commits.commit_of(repository / "beside") == head[:12]

    def test_the_commit_is_not_that_of_an_enclosing_repository(self, repository: Path) -> None:
        inside = repository / ".venv"
        inside.mkdir()
        assert commits.commit_of(inside) is None

    def test_the_commit_is_unknown_without_git(self, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        assert commits.commit_of(repository) is None

    def test_the_commit_is_unknown_in_an_empty_repository(self, tmp_path: Path) -> None:
        git(tmp_path, "init", "-q")
        assert commits.commit_of(tmp_path) is None

    def test_the_commit_is_read_from_the_file_in_a_wheel(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(commits, "BAKED", tmp_path / "COMMIT")
        assert commits.commit() == commits.commit_of(ROOT)
        (tmp_path / "COMMIT").write_text("0123456789ab\n")
        assert commits.commit() == "0123456789ab"


def test_a_build_records_the_commit(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repository / "engine").mkdir()
    for name in ("hatch_build.py", "engine/commit.py"):
        shutil.copy(ROOT / name, repository / name)
    write_commit = runpy.run_path(str(repository / "hatch_build.py"))["write_commit"]
    assert write_commit().read_text() == f"{git(repository, 'rev-parse', 'HEAD')[:12]}\n"
    # As the container image, whose build has no repository.
    shutil.rmtree(repository / ".git")
    assert write_commit() is None
    monkeypatch.setenv("FASTBLT_COMMIT", "0123456789abcdef")
    assert write_commit().read_text() == "0123456789ab\n"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="levels are those of x86-64")
@pytest.mark.parametrize("refused", ["x86-64-v4", "x86-64"], ids=["one level", "all"])
def test_levels_that_the_compiler_does_not_know_are_left_out(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("hatch_build.py", "kernels/available.py", "kernels/native/native.c"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("int x;" if name.endswith(".c") else (ROOT / name).read_text())
    (tmp_path / "kernels" / "native" / "old.so").write_text("of other sources")
    cc = tmp_path / "cc"
    # Only what is compiled: the probe passes.
    cc.write_text(f'#!/bin/sh\ncase "$*" in *-march={refused}*-o*) exit 1;; esac\nexec cc "$@"\n')
    cc.chmod(0o755)
    monkeypatch.setenv("CC", str(cc))
    build = runpy.run_path(str(tmp_path / "hatch_build.py"))
    assert build["compiler"]() == [str(cc)]
    if refused == "x86-64":
        with pytest.raises(subprocess.CalledProcessError):
            build["compile_all"]()
        # One that is too old for the levels is none.
        cc.write_text('#!/bin/sh\ncase "$*" in *-march=*) exit 1;; esac\nexec cc "$@"\n')
        monkeypatch.setenv("PATH", str(tmp_path))
        assert build["compiler"]() is None
        return
    assert [path.stem for path in build["compile_all"]()] == ["x86-64-v2", "x86-64-v3"]
    assert {path.stem for path in (tmp_path / "kernels" / "native").glob("*.so")} == {"x86-64-v2", "x86-64-v3"}


def test_the_native_library_is_the_best_for_this_processor() -> None:
    """torch asks the processor itself."""
    if sys.platform != "linux" or not native.LIBRARY:
        pytest.skip("needs Linux and a C compiler")
    path = available.library()
    assert path and native.LIBRARY._name == str(path)
    if path.stem.startswith("x86-64"):
        levels = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}
        assert path.stem == levels.get(torch.backends.cpu.get_cpu_capability(), "x86-64-v2")


@pytest.mark.parametrize(
    ("flags", "best"),
    [
        (V4, "x86-64-v4"),
        (V4.replace(" avx512cd", ""), "x86-64-v3"),
        (V4.replace(" bmi2", ""), "x86-64-v2"),
        (V3, "x86-64-v3"),
        (V3.replace(" avx2", ""), "x86-64-v2"),
        ("", "x86-64-v2"),
    ],
)
def test_an_instruction_set_level_needs_all_its_instructions(
    flags: str, best: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\nflags\t\t: {flags}\nvmx flags\t: avx512f\n\nprocessor\t: 1\n")
    monkeypatch.setattr(available, "CPUINFO", file)
    found = available.levels(available.cpu_flags())
    assert found[0] == best and found[-1] == "x86-64-v2"
    file.unlink()
    assert available.levels(available.cpu_flags()) == ["x86-64-v2"]


@pytest.mark.parametrize(
    ("bound", "best"),
    [("default", "x86-64-v2"), ("avx2", "x86-64-v3"), ("avx512", "x86-64-v4"), ("sse", "x86-64-v4"), ("", "x86-64-v4")],
)
def test_torchs_variable_bounds_the_instruction_set(bound: str, best: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", bound)
    assert available.levels(available.X86_64_V4)[0] == best
    # One that the processor does not have raises nothing.
    below = {"x86-64-v4": "x86-64-v3"}.get(best, best)
    assert available.levels(available.X86_64_V3)[0] == below


@pytest.mark.parametrize(
    ("triton", "instruction_set", "kernels"),
    [
        ("3.9.0", "x86-64-v3", {"cpu": "native", "cuda": "triton"}),
        ("3.9.0", None, {"cpu": "torch", "cuda": "triton"}),
        (None, "aarch64", {"cpu": "native", "cuda": "torch"}),
    ],
)
def test_the_preferred_kernels_are_the_best_available(
    triton: str | None, instruction_set: str | None, kernels: dict[str, KernelName]
) -> None:
    here = Installed("0.1.0", None, "2.13.0", triton, instruction_set)
    assert {device: here.preferred(device) for device in kernels} == kernels
    assert here.rows()["commit"] == "unknown"
    assert here.rows()["triton"] == (triton or "not installed")
    assert here.detailed("native") == (f"native ({instruction_set})" if instruction_set else "native")
    assert here.detailed("torch") == "torch"


def test_reporting_versions_loads_neither_torch_nor_triton() -> None:
    loaded = "{'torch', 'triton', 'numpy'} & sys.modules.keys()"
    code = f"import sys, server.cli; server.cli.installed(); sys.exit(bool({loaded}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_version_flag_reports_what_is_installed() -> None:
    result = CliRunner().invoke(app, ["--version"])
    told = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert result.exit_code == 0 and result.stdout.startswith(f"fastblt {version('fastblt')}\n")
    assert told["torch"] == torch.__version__
    assert told["kernels"].startswith(choose_kernels(None, torch.device("cpu")).name)
    assert told.keys() == {"fastblt", "commit", "torch", "triton", "kernels"}
    if shutil.which("git") and (ROOT / ".git").exists():
        assert told["commit"].removesuffix("-dirty") == git(ROOT, "rev-parse", "HEAD")[:12]


def test_the_version_route_reports_what_is_installed(tiny_server: str) -> None:
    told, here = httpx.get(f"{tiny_server}/version").json(), installed()
    kernels = choose_kernels(None, torch.device("cpu")).name
    assert told["version"] == version("fastblt")
    assert told["torch"] == torch.__version__
    assert (told["commit"], told["triton"]) == (here.commit, here.triton)
    assert told["kernels"] == kernels
    assert told["instruction_set"] == (Path(native.LIBRARY._name).stem if native.LIBRARY else None)
