"""What every test can rely on."""

import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from typer.testing import CliRunner

# As `server.cli` does, and for the same reason: tests share their machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Without a GPU the Triton kernels run in Triton's interpreter; it is chosen when they are defined.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"
# One core per worker: torch reads this when it is imported, and so do the processes that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# nohup has servers ignore SIGHUP, as they should; tests that send it need one that does not.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# That an example takes long, to draw or to run, proves nothing where tests share their machine.
settings.register_profile("shared-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared-machine")

COMMAND = [sys.executable, "-m", "server"]
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the preset "tiny", float32, seed 0."""
    # What this imports may read the variables above.
    from server.cli import app

    out = tmp_path_factory.mktemp("checkpoint") / "tiny"
    done = CliRunner().invoke(app, ["init", "--config", "tiny", "--dtype", "float32", str(out)])
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture(scope="session")
def tiny_server(tiny: Path) -> Iterator[str]:
    """The address of `fastblt serve` with that checkpoint. It must end with 0 after one SIGINT."""
    flags = ["--model", tiny, "--port", "0", "--cache-bytes", str(64 << 20), "--num-threads", "1"]
    with subprocess.Popen([*COMMAND, "serve", *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        log = ""
        while not (found := re.search(r"serving tiny on (http://\S+)", log)):
            line = process.stderr.readline()
            assert line, log
            log += line
        try:
            yield found[1]
        finally:
            process.send_signal(signal.SIGINT)
            log += process.communicate(timeout=60)[1]
    assert process.returncode == 0, log


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Shows what tests record as a "figure", from whichever process they ran in."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, figure in getattr(report, "user_properties", ()):
            if name == "figure":
                terminalreporter.write_line(str(figure))


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Undoes what a test does to logging, such as refusing a server's settings in this process."""
    root, ours, hook = logging.getLogger(), logging.getLogger("fastblt"), sys.excepthook
    before = root.handlers[:], root.level, ours.level
    yield
    logging.captureWarnings(False)
    for handler in root.handlers:
        if handler not in before[0]:
            handler.close()
    root.handlers[:], sys.excepthook = before[0], hook
    root.setLevel(before[1])
    ours.setLevel(before[2])
