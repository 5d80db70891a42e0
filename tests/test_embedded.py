"""The model that comes with fastblt, in a checkout and where a wheel was installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.checkpoint import load
from engine.commit import commit_of
from server.embedded import embedded_model
from tests.conftest import ROOT


def test_a_checkout_has_the_embedded_model_beside_the_packages() -> None:
    assert embedded_model() == ROOT / "models" / "nano"
    assert load(embedded_model()).config.name == "nano"


def test_an_installed_package_has_the_embedded_model_inside(tmp_path: Path) -> None:
    package, neighbour = tmp_path / "server", tmp_path / "models" / "nano"
    inside = package / "models" / "nano"
    inside.mkdir(parents=True)
    # Another package's, perhaps.
    neighbour.mkdir(parents=True)
    assert embedded_model(package) == inside


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a wheel of this checkout is installed, without what it depends on."""
    wheels, site = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", wheels, ROOT], check=True)
    (wheel,) = wheels.iterdir()
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", site, wheel], check=True)
    return site


def run(site: Path, cwd: Path, *arguments: str) -> str:
    """What a command prints that is installed there."""
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_an_installed_wheel_knows_its_commit(site: Path, tmp_path: Path) -> None:
    told = run(site, tmp_path, "-m", "server", "--version").splitlines()
    assert told[1].split() == ["commit", commit_of(ROOT) or "unknown"]
    assert (site / "engine" / "COMMIT").exists() == (commit_of(ROOT) is not None)


@pytest.mark.slow
def test_an_installed_wheel_runs_its_embedded_model_from_any_folder(site: Path, tmp_path: Path) -> None:
    found = Path(run(site, tmp_path, "-c", "from server.embedded import *; print(embedded_model())").strip())
    assert found == site / "server" / "models" / "nano"
    assert {path.name for path in found.iterdir()} == {"README.md", "config.json", "decoders.json", "model.safetensors"}
    assert run(site, tmp_path, "-m", "server", "inspect").startswith("nano: fastblt format, ")
    command = ["-m", "server", "generate", "--prompt=for i in ", "--max-tokens=6"]
    assert run(site, tmp_path, *command) == run(ROOT, ROOT, *command) != ""
