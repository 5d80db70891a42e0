"""Runs programs that a model has written, each in a process of its own that can do little: see `jail.py`."""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

JAIL = Path(__file__).with_name("jail.py")
MOST_ANSWER = 4096
"""Bytes that are read of what a jail tells."""
SPARE_SECONDS = 2.0
"""The jail's own alarm comes first, unless the program switches it off; then so much later the jail is killed."""
CROWDED = 10
"""Times as long as on a processor of its own a program may take: others may want the processor, too."""
OUT_OF_TIME, OUT_OF_PROCESSOR_TIME = 128 + signal.SIGALRM, 128 + signal.SIGPROF

Execution = Literal["isolated", "limited"]
"""isolated: in namespaces of its own, without network, other processes, or files outside its folder. limited: limits on
time, memory, files and processes alone, for kernels and containers that do not let a program leave its namespaces."""


class SandboxError(RuntimeError):
    """Nothing can be run in the sandbox here."""


@dataclass(frozen=True, slots=True)
class Limits:
    """seconds: on a processor, so that no verdict depends on what else the machine does. file_bytes: of a file, and of
    all files together where they are in memory."""

    seconds: float = 3.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 24
    open_files: int = 32

    @property
    def wall_seconds(self) -> float:
        """By the clock: for programs that wait, whatever for."""
        return CROWDED * self.seconds

    @property
    def kernel_seconds(self) -> int:
        """On a processor, as a second line for programs that ignore the first: the kernel only counts whole ones."""
        return int(self.seconds) + 2


@dataclass(frozen=True, slots=True)
class Verdict:
    """reason: why the program failed, in a few words; empty if it did not."""

    passed: bool
    reason: str = ""


class Sandbox:
    """Safe to use from several threads."""

    def __init__(self, execution: Execution, limits: Limits, python: str | None = None) -> None:
        """python: the interpreter to run programs with; by default this one. Raises SandboxError unless programs run in
        it here."""
        self._isolated, self.limits = execution == "isolated", limits
        # Not a virtual environment's: site-packages are no business of the program.
        self._python = python or os.path.realpath(sys.executable)
        if self._isolated and sys.platform != "linux":
            raise SandboxError(f"the isolated sandbox needs Linux, and this is {sys.platform}")
        try:
            verdict = self.run("import math\nassert math.sqrt(4) == 2")
        except SandboxError as error:
            instead = "; --execute limited does without namespaces" if self._isolated else ""
            raise SandboxError(f"no program can be executed here: {error}{instead}") from None
        if not verdict.passed:
            why = f"no program can be executed here: {verdict.reason}"
            if os.geteuid() == 0 and not self._isolated:
                why += f"; programs run as nobody, who must be able to read {self._python}"
            raise SandboxError(why)

    @property
    def about(self) -> dict[str, Any]:
        """What verdicts depend on."""
        return {"isolated": self._isolated, **asdict(self.limits), "wall_seconds": self.limits.wall_seconds}

    def run(self, program: str) -> Verdict:
        """Whether it runs to its last line, within the limits. Raises SandboxError if it could not be started."""
        secret = secrets.token_hex(16)
        more = {"wall_seconds": self.limits.wall_seconds, "kernel_seconds": self.limits.kernel_seconds}
        limits = asdict(self.limits) | more
        job = {"program": program, "secret": secret, "isolated": self._isolated, "limits": limits}
        with tempfile.TemporaryDirectory(prefix="fastblt-", ignore_cleanup_errors=True) as folder:
            # For nobody, which root becomes.
            os.chmod(folder, 0o777)
            told, code = self._talk(json.dumps(job).encode(), folder)
        return _verdict(told, code, secret, self.limits)

    def _talk(self, job: bytes, folder: str) -> tuple[bytes, int | None]:
        """What the jail tells, and its status; None if time ran out."""
        # Files, unlike pipes, hold no reader up, and are no longer than a file may be.
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as told:
            given.write(job)
            given.seek(0)
            jail = subprocess.Popen(
                [self._python, "-I", "-S", "-B", str(JAIL)],
                cwd=folder,
                env={"PATH": "/usr/bin:/bin", "HOME": "/"},
                stdin=given,
                stdout=told,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                code: int | None = jail.wait(self.limits.wall_seconds + SPARE_SECONDS)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                # The group may have members after its leader has ended.
                with suppress(ProcessLookupError):
                    os.killpg(jail.pid, signal.SIGKILL)
                jail.wait()
            told.seek(0)
            return told.read(MOST_ANSWER), code


def _verdict(told: bytes, code: int | None, secret: str, limits: Limits) -> Verdict:
    try:
        answer = json.loads(told)
    except (ValueError, RecursionError):
        answer = {}
    if not isinstance(answer, dict):
        answer = {}
    # The program may write there, but has no secret by accident. One that looks for it in its own frames finds it.
    if answer.get("secret") == secret:
        if "setup" in answer:
            raise SandboxError(answer["setup"])
        return Verdict(answer["error"] is None, answer["error"] or "")
    if code == OUT_OF_PROCESSOR_TIME:
        return Verdict(False, f"took more than {limits.seconds:g} s of a processor")
    if code is None or code == OUT_OF_TIME:
        return Verdict(False, f"took longer than {limits.wall_seconds:g} s")
    number = code - 128 if code > 128 else -code
    with suppress(ValueError):
        return Verdict(False, f"killed by {signal.Signals(number).name}")
    return Verdict(False, f"ended its process with status {code}")
