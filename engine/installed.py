"""What is installed here, found quickly and without torch: versions, the commit, the kernel backends."""

from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from kernels import available

from .commit import commit
from .config import KernelName


@dataclass(frozen=True, slots=True)
class Installed:
    """version: "unknown" in a checkout that was never installed. commit: as in `engine.commit`. torch, triton: None if
    not installed. instruction_set: what the C kernels that this processor loads were compiled for, "x86-64-v3" or a
    machine's name; None if none were compiled."""

    version: str
    commit: str | None
    torch: str | None
    triton: str | None
    instruction_set: str | None

    def preferred(self, device: str) -> KernelName:
        """The default kernel backend of a device ("cpu", "cuda")."""
        return available.preferred(device, self.instruction_set is not None, self.triton is not None)

    def detailed(self, kernels: str) -> str:
        """The kernel backend, for people: "native (x86-64-v3)", "triton" or "torch"."""
        return f"{kernels} ({self.instruction_set})" if kernels == "native" and self.instruction_set else kernels

    def rows(self) -> dict[str, str]:
        """The versions by their names, for people."""
        return {
            "fastblt": self.version,
            "commit": self.commit or "unknown",
            "torch": self.torch or "not installed",
            "triton": self.triton or "not installed",
        }


@cache
def installed() -> Installed:
    """What is installed on this machine. It does not change while a process runs."""
    library = available.library()
    return Installed(
        version=_version("fastblt") or "unknown",
        commit=commit(),
        torch=_version("torch"),
        triton=_version("triton"),
        instruction_set=library.stem if library else None,
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
