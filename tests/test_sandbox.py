"""The sandbox of `fastblt tasks`: programs that misbehave fail, and harm nothing."""

import os
import socket
import sys
import time
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest

from server.evaluation.sandbox import JAIL, Execution, Limits, Sandbox, SandboxError

LIMITS = Limits(seconds=0.4, memory_bytes=256 << 20, file_bytes=1 << 20)


@pytest.fixture(scope="module")
def isolated() -> Sandbox:
    try:
        return Sandbox("isolated", LIMITS)
    except SandboxError as error:
        pytest.skip(f"this machine does not let programs leave its namespaces: {error}")


@pytest.fixture(scope="module")
def limited() -> Sandbox:
    try:
        return Sandbox("limited", LIMITS)
    except SandboxError as error:
        # Root's own Python, which nobody can read.
        if "as nobody" not in str(error) or not os.path.exists("/usr/bin/python3"):
            raise
        return Sandbox("limited", LIMITS, "/usr/bin/python3")


@pytest.fixture(params=["isolated", "limited"])
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    found: Sandbox = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize(
    "program",
    [
        "from typing import List\ndef f(x: List[int]) -> int:\n    return sum(x)\nassert f([1, 2]) == 3",
        "open('here', 'w').write('x')\nassert open('here').read() == 'x'",
        "import os\nassert os.listdir('.') == []",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nassert A(1) == A(1)",
        "print('x' * 1000)",
    ],
)
def test_a_program_that_is_right_passes(sandbox: Sandbox, program: str) -> None:
    patient = copy(sandbox)
    patient.limits = replace(LIMITS, seconds=20.0)
    verdict = patient.run(program)
    assert verdict.passed and not verdict.reason, verdict


LIAR = """import os
for n in range(3, 64):
    try: os.write(n, b'{"setup": "not so", "error": null}')
    except OSError: pass
os._exit(1)
"""
"""Finds the jail's way to tell, and tells that the jail could not be built."""
MISBEHAVING = [
    ("assert 1 + 1 == 3, 'no'", "AssertionError: no"),
    ("def f(:", "SyntaxError"),
    ("x = '\0'", "null bytes"),
    ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ("class E(Exception):\n    def __str__(self): raise ValueError\nraise E", "E"),
    ("import sys\nsys.exit(0)", "SystemExit: 0"),
    ("import os\nos._exit(0)", "status 0"),
    ("import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()\nf()", ""),
    ("x = bytearray(1 << 30)", "MemoryError"),
    ("while True: pass", "took "),
    ("while True:\n    try:\n        while True: pass\n    except BaseException: pass", "took "),
    ("import time\ntime.sleep(-1)", "ValueError"),
    ("while True: print('x' * 100000)", "took "),
    ("import os\nos.fork()", "BlockingIOError"),
    ("import subprocess\nsubprocess.run(['true'], check=True)", "Error"),
    ("f = open('big', 'wb')\nwhile True: f.write(b'x' * 65536)", "Error"),
    ("import os\nos.write(1, b'x')\nos.read(0, 1)[0]", "IndexError"),
    (LIAR, "status 1"),
    ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
    ("import os\nos._exit(-1)", "status 255"),
    ("import os\nos.kill(os.getpid(), 40)", ""),
]


@pytest.mark.parametrize(("program", "reason"), MISBEHAVING)
def test_a_program_that_misbehaves_fails(isolated: Sandbox, program: str, reason: str) -> None:
    verdict = isolated.run(program)
    assert not verdict.passed and reason in verdict.reason, verdict


@pytest.mark.parametrize(("program", "reason"), MISBEHAVING[::2])
def test_a_program_that_misbehaves_fails_by_limits_alone(limited: Sandbox, program: str, reason: str) -> None:
    verdict = limited.run(program)
    assert not verdict.passed and reason in verdict.reason, verdict


def test_a_program_that_sleeps_for_too_long_is_stopped_by_the_clock(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.evaluation.sandbox.CROWDED", 2)
    assert sandbox.run("import time\ntime.sleep(60)").reason == "took longer than 0.8 s"


@pytest.mark.parametrize("does", ["while True: pass", "time.sleep(60)"])
def test_a_program_that_outlives_its_alarms_is_killed(
    isolated: Sandbox, does: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.evaluation.sandbox.CROWDED", 2)
    began = time.monotonic()
    ignores = "for alarm in (signal.SIGALRM, signal.SIGPROF): signal.signal(alarm, signal.SIG_IGN)"
    verdict = isolated.run(f"import signal, time\n{ignores}\n{does}")
    assert not verdict.passed and time.monotonic() - began < 30


def test_a_program_that_is_busy_for_too_long_is_stopped_by_its_processor_time(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However little of a processor this machine has for it."""
    monkeypatch.setattr("server.evaluation.sandbox.CROWDED", 1000)
    assert sandbox.run("while True: pass").reason == "took more than 0.4 s of a processor"


def test_a_program_that_others_keep_from_the_processor_passes(sandbox: Sandbox) -> None:
    """As if it had waited for one, and got little of it."""
    verdict = sandbox.run("import time\ntime.sleep(0.8)\nsum(range(1000))")
    assert verdict.passed, verdict


def test_a_program_cannot_kill_what_started_it(sandbox: Sandbox) -> None:
    attack = "for victim in (os.getppid(), -os.getppid()):\n    try: os.kill(victim, 9)\n    except OSError: pass\n"
    assert not sandbox.run(f"import os\n{attack}os.killpg(0, 9)").passed
    assert sandbox.run("").passed


def test_an_isolated_program_writes_nowhere_else(isolated: Sandbox, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("x")
    for place in (kept, tmp_path / "new", Path("/usr/new"), Path("/new"), Path("/etc/new")):
        verdict = isolated.run(f"open({str(place)!r}, 'w').write('y')")
        assert not verdict.passed and "Error" in verdict.reason, (place, verdict)
    assert not isolated.run(f"import os\nos.remove({str(kept)!r})").passed
    assert kept.read_text() == "x" and [*tmp_path.iterdir()] == [kept]


def test_an_isolated_program_has_no_network(isolated: Sandbox, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        verdict = isolated.run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 0.5)")
        assert not verdict.passed and "OSError" in verdict.reason, verdict
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_an_isolated_program_sees_neither_files_nor_processes_nor_environment(
    isolated: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FASTBLT_SECRET", "x")
    python = Path(sys.base_prefix).resolve().parts[1]
    root = {"bin", "lib", "lib32", "lib64", "usr", "nix", "dev", "work", python}
    checks = [
        "not os.path.exists('/proc/1')",
        f"not os.path.exists({str(tmp_path)!r})",
        f"{{*os.listdir('/')}} <= {root!r}",
        "'FASTBLT_SECRET' not in os.environ",
        "os.getpid() == 2 and os.getppid() == 1",
    ]
    verdict = isolated.run("import os\n" + "\n".join(f"assert {check}, {i}" for i, check in enumerate(checks)))
    assert verdict.passed, verdict


def test_an_isolated_program_finds_no_way_back_to_its_rights(isolated: Sandbox) -> None:
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
assert libc.mount(b"none", b"/usr", b"tmpfs", 0, None) < 0, "mount"
assert libc.mount(None, b"/usr", None, 32 | 4096, None) < 0, "remount"
assert libc.umount2(b"/usr", 0) < 0, "umount"
try: os.setuid(0)
except OSError: pass
assert os.geteuid() != 0 or os.access('/usr', os.W_OK) is False, "root"
"""
    verdict = isolated.run(program)
    assert verdict.passed, verdict


def test_a_killing_spree_of_an_isolated_program_reaches_nobody(isolated: Sandbox) -> None:
    child = os.fork()
    if not child:
        time.sleep(30)
        os._exit(0)
    isolated.run("import os\nos.kill(-1, 9)")
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, 9)
    os.waitpid(child, 0)


def test_a_kernel_that_permits_no_namespaces_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # The jail, but for a kernel like that of most containers.
    opened = "libc = ctypes.CDLL(None, use_errno=True)\n"
    refuse = "def refuse(_): ctypes.set_errno(1); return -1\n"
    source = JAIL.read_text().replace(opened, opened + refuse).replace("libc.unshare", "refuse")
    assert source.count("refuse") == 3
    (tmp_path / "jail.py").write_text(source)
    monkeypatch.setattr("server.evaluation.sandbox.JAIL", tmp_path / "jail.py")
    with pytest.raises(SandboxError, match=r"unshare: Operation not permitted; --execute limited does without"):
        Sandbox("isolated", LIMITS)


def test_a_sandbox_that_cannot_be_built_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    execution: Execution = "isolated"
    monkeypatch.setattr("server.evaluation.sandbox.sys.platform", "plan9")
    with pytest.raises(SandboxError, match="needs Linux, and this is plan9"):
        Sandbox(execution, LIMITS)
