"""Compiles kernels/native when the package is built or installed; `python hatch_build.py` does it in place.

A wheel also gets the embedded model, where `server/embedded.py` looks for it, and the commit, where `engine/commit.py`
does.

A C compiler is taken where there is one. Where there is none, pip is asked for one in a wheel (ziglang), which is gone
again when the build is over. If neither works the package is built all the same, and torch computes.
"""

import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
FOLDER = ROOT / "kernels" / "native"
MODEL = ("README.md", "config.json", "decoders.json", "model.safetensors")
"""Of models/nano, what a wheel has: without the pictures of its card."""
LEVELS = ("x86-64-v2", "x86-64-v3", "x86-64-v4")
"""Of x86-64: any processor of the last 15 years, with AVX2, with AVX-512. What is best is chosen when it is loaded."""
FLAGS = (
    "-std=c11", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-pthread",
    "-Wall", "-Wextra", "-Wno-psabi",
)  # fmt: skip


def compiler() -> list[str] | None:
    """The machine's own, as CC names it or under its usual names, if it is new enough."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and shutil.which(shlex.split(name)[0]) and is_new_enough(shlex.split(name)):
            return shlex.split(name)
    return None


def is_new_enough(found: list[str]) -> bool:
    """Whether a compiler knows the levels of x86-64, as GCC does since 11."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    try:
        command = [*found, f"-march={LEVELS[-1]}", "-E", "-x", "c", os.devnull]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def compile_all() -> list[Path]:
    """A library per level, beside the sources; a level that cannot be compiled is left out. Raises OSError, or
    CalledProcessError if none can be."""
    machine = platform.machine().lower()
    own = compiler()
    found = own or [sys.executable, "-m", "ziglang", "cc"]
    sources = runpy.run_path(str(ROOT / "kernels" / "available.py"))["sources"]()
    for old in FOLDER.glob("*.so"):
        old.unlink()
    libraries, failure = [], None
    for name in LEVELS if machine in ("x86_64", "amd64") else (machine,):
        level = []
        if name in LEVELS:
            level = [f"-march={name}"] if own else [f"-mcpu={name.replace('-', '_')}"]
        library = FOLDER / f"{name}.so"
        unfinished = library.with_suffix(".new")
        of = f'-DFASTBLT_SOURCES="{sources}"'
        command = [*found, *FLAGS, *level, of, "-o", str(unfinished), str(FOLDER / "native.c"), "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            failure = error
            continue
        unfinished.replace(library)
        libraries.append(library)
    if failure and not libraries:
        raise failure
    return libraries


def write_commit() -> Path | None:
    """A file with the commit: as FASTBLT_COMMIT says, where git or the repository is missing, else as git does."""
    commit_of = runpy.run_path(str(ROOT / "engine" / "commit.py"))["commit_of"]
    commit = os.environ.get("FASTBLT_COMMIT", "")[:12] or commit_of(ROOT)
    if not commit:
        return None
    file = ROOT / "build" / "COMMIT"
    file.parent.mkdir(exist_ok=True)
    file.write_text(f"{commit}\n")
    return file


def get_build_hook() -> type:
    """What hatchling asks for; to compile in place needs no hatchling."""
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface

    class NativeHook(BuildHookInterface[Any]):
        def dependencies(self) -> list[str]:
            return [] if compiler() else ["ziglang>=0.13"]

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            # An editable installation uses those of the checkout.
            if version != "editable":
                for name in MODEL:
                    build_data["force_include"][f"models/nano/{name}"] = f"server/models/nano/{name}"
                if file := write_commit():
                    build_data["force_include"][str(file)] = "engine/COMMIT"
            try:
                compile_all()
            except (OSError, subprocess.CalledProcessError) as error:
                why = getattr(error, "stderr", None) or error
                self.app.display_warning(f"kernels/native was not compiled, torch will compute: {why}")
                return
            build_data["artifacts"].append("/kernels/native/*.so")
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{_platform_tag()}"

    return NativeHook


def _platform_tag() -> str:
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")


if __name__ == "__main__":
    print(*compile_all(), sep="\n")
