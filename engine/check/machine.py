"""The device, its driver and the versions installed, and which of them are outside what fastblt supports."""

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels.dispatch import Kernels

from ..config import DeviceName
from ..installed import installed

LEAST: dict[str, tuple[int, int]] = {"python": (3, 11), "torch": (2, 11), "triton": (3, 6)}
"""The oldest versions that are supported."""
LEAST_CAPABILITY = (8, 0)
DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True)
class Machine:
    """memory_bytes: of the device, or of the host for a CPU. compute_capability, driver, cuda: None without a CUDA
    device; cuda: the version that torch was built for. versions: by name, None if not installed. kernels: the
    backend that is used."""

    device: DeviceName
    name: str
    memory_bytes: int
    compute_capability: tuple[int, int] | None
    driver: str | None
    cuda: str | None
    versions: dict[str, str | None]
    kernels: str


def default_device() -> DeviceName:
    return "cuda" if torch.cuda.is_available() else "cpu"


def look(device: DeviceName, kernels: Kernels) -> Machine:
    """Describes the machine."""
    here = installed()
    versions = {"fastblt": here.version, "python": platform.python_version(), "torch": torch.__version__}
    all_versions: dict[str, str | None] = {**versions, "triton": here.triton}
    chosen = here.detailed(kernels.name)
    if device == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        name = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
        return Machine(device, name, memory, None, driver(), torch.version.cuda, all_versions, chosen)
    of = torch.cuda.get_device_properties(0)
    capability = of.major, of.minor
    return Machine(
        device, of.name, of.total_memory, capability, driver(), torch.version.cuda, all_versions, chosen
    )  # fmt: skip


def driver(path: Path = DRIVER) -> str | None:
    """The version of NVIDIA's kernel driver; None without one."""
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", path.read_text())
    except OSError:
        return None
    return found[0] if found else None


def unsupported(machine: Machine) -> list[str]:
    """What is outside what is supported, in words."""
    wrong = []
    for name, least in LEAST.items():
        version = machine.versions[name]
        if version is not None and (parsed := _parsed(version)) is not None and parsed < least:
            wrong.append(f"{name} {version} is too old: {least[0]}.{least[1]} is the oldest that is supported")
    capability = machine.compute_capability
    if capability is not None and capability < LEAST_CAPABILITY:
        wrong.append(
            f"{machine.name} has compute capability {capability[0]}.{capability[1]}: the kernels need "
            f"{LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} (A100, RTX 30) or higher"
        )
    if machine.device == "cpu" and machine.driver and not torch.cuda.is_available():
        built = f"CUDA {machine.cuda}" if machine.cuda else "CPUs only"
        wrong.append(
            f"there is an NVIDIA driver ({machine.driver}), but torch {machine.versions['torch']} finds no CUDA "
            f"device: it was built for {built}, which may need a newer driver"
        )
    return wrong


def slower(machine: Machine) -> list[str]:
    """What is supported, but makes fastblt slow."""
    if not machine.kernels.startswith("torch"):
        return []
    missing = "triton is not installed" if machine.device == "cuda" else "fastblt's own CPU kernels were not compiled"
    why = missing if installed().preferred(machine.device) == "torch" else "--kernels torch"
    return [f"the kernels are torch's ({why}): several times slower, and texts may depend on the batch in near-ties"]


def _parsed(version: str) -> tuple[int, int] | None:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else None
