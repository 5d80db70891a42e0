"""deploy/constraints.txt, the versions in the image, against pyproject.toml and against what pip would install."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONSTRAINTS = (ROOT / "deploy" / "constraints.txt").read_text()
PINNED = dict(re.findall(r"^([a-z0-9-]+)==(\S+)$", CONSTRAINTS, re.M))
DOCKERFILE = (ROOT / "Dockerfile").read_text()


UV = Path(sys.executable).with_name("uv")
(EXTRA,) = re.findall(r"pip install \.\[(\w+)\]", DOCKERFILE)
NEEDED = [
    Requirement(text)
    for text in (
        *PYPROJECT["project"]["dependencies"],
        *PYPROJECT["project"]["optional-dependencies"][EXTRA],
        *PYPROJECT["build-system"]["requires"],
    )
]
"""What the image installs, and what builds our package."""


def test_every_constraint_pins_a_version() -> None:
    lines = [line for line in CONSTRAINTS.splitlines() if line and not line.startswith("#")]
    assert len(lines) == len(PINNED) > 60


@pytest.mark.parametrize("requirement", NEEDED, ids=lambda requirement: requirement.name)
def test_pinned_versions_are_those_that_the_project_allows(requirement: Requirement) -> None:
    version = PINNED[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version), f"{requirement.name} {version}: `make constraints` resolves anew"


def test_the_pinned_torch_is_the_one_of_the_tests() -> None:
    assert re.findall(r"^TORCH \?= torch==(\S+)$", (ROOT / "Makefile").read_text(), re.M) == [PINNED["torch"]]


def test_the_base_image_has_the_cuda_version_of_torch() -> None:
    (version,) = re.findall(r"^ARG BASE=nvidia/cuda:(\d+\.\d+\.\d+)-base-", DOCKERFILE, re.M)
    assert PINNED["cuda-toolkit"].startswith(version)


def test_the_constraints_are_exactly_the_packages_of_the_image() -> None:
    """Resolved for the base's Python, 3.12, with every other version forbidden."""
    command = [UV, "pip", "compile", "--quiet", "--no-python-downloads", "--no-header", "--no-annotate", "-"]
    command += ["--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_28"]
    command += ["--constraints", str(ROOT / "deploy" / "constraints.txt")]
    done = subprocess.run(command, input="\n".join(map(str, NEEDED)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {f"{name}=={version}" for name, version in PINNED.items()}
