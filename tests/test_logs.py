"""How a log line looks, whatever it says."""

import io
import json
import logging
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from engine import logs
from engine.logs import FormatName, HumanFormatter, LevelName, LogSettings
from engine.process.log_writer import LIMIT_BYTES
from tests.conftest import ROOT

Log = Callable[[FormatName, LevelName], io.StringIO]


@pytest.fixture
def log() -> Log:
    """Configures logging for one test; what is logged can be read from what this returns."""

    def configure(format: FormatName, level: LevelName = "info") -> io.StringIO:
        stream = io.StringIO()
        logs.configure(LogSettings(level, format), "test", stream)
        return stream

    return configure


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text(stream).splitlines()]


def text(stream: io.StringIO) -> str:
    logs.flush()
    return stream.getvalue()


def fail() -> None:
    try:
        raise ValueError("two\nlines, a \u2028 separator and half a pair \udcff")
    except ValueError:
        logging.getLogger("fastblt.x").exception("it\nfailed", extra={"count": 3, "path": ROOT, "names": ["a"]})


def test_a_json_log_line_is_one_line_whatever_it_holds(log: Log) -> None:
    stream = log("json", "info")
    fail()
    (line,) = lines(stream)
    assert list(line)[:6] == ["time", "level", "process", "pid", "logger", "message"]
    assert (line["level"], line["process"], line["logger"]) == ("error", "test", "fastblt.x")
    assert line["message"] == "it\nfailed"
    assert (line["count"], line["path"], line["names"]) == (3, str(ROOT), ["a"])
    assert line["exception"].startswith("Traceback") and "lines, a \u2028 separator" in line["exception"]
    assert len(line["time"]) == len("2026-01-01T00:00:00.000Z") and line["time"].endswith("Z")
    assert abs((datetime.fromisoformat(line["time"]) - datetime.now(UTC)).total_seconds()) < 60


def test_a_human_log_line_is_one_line_except_for_a_traceback(log: Log) -> None:
    stream = log("human", "info")
    fail()
    first, *traceback = text(stream).splitlines()
    assert first.split()[1:] == ["ERROR", "x", "it\\nfailed"]
    assert traceback[0].startswith("Traceback")


def test_every_log_line_of_a_request_has_the_request_fields(log: Log) -> None:
    for format in ("human", "json"):
        stream = log(format, "info")
        token = logs.context.set({"request_id": "r-1", "trace_id": "t-1"})
        logging.getLogger("uvicorn.error").warning("odd")
        logs.context.reset(token)
        logging.getLogger("fastblt").info("later")
        odd, later = text(stream).splitlines()
        assert "r-1" in odd and "r-1" not in later
        assert ("t-1" in odd) == (format == "json")


def test_debug_level_applies_only_to_fastblt_loggers(log: Log) -> None:
    stream = log("json", "debug")
    for name in ("fastblt.a", "asyncio", "urllib3.connectionpool"):
        logging.getLogger(name).debug("said")
        logging.getLogger(name).info("said")
    assert [(line["logger"], line["level"]) for line in lines(stream)] == [
        ("fastblt.a", "debug"),
        ("fastblt.a", "info"),
        ("asyncio", "info"),
        ("urllib3.connectionpool", "info"),
    ]


def test_lines_below_the_log_level_are_left_out(log: Log) -> None:
    stream = log("json", "error")
    for name in ("fastblt", "other"):
        logging.getLogger(name).warning("said")
        logging.getLogger(name).error("said")
    assert [line["level"] for line in lines(stream)] == ["error", "error"]


def test_warnings_and_uncaught_exceptions_are_logged(log: Log) -> None:
    stream = log("json", "info")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("mind the gap", stacklevel=1)
    sys.excepthook(KeyError, KeyError("lost"), None)
    warned, uncaught = lines(stream)
    assert (warned["logger"], warned["level"]) == ("py.warnings", "warning") and "mind the gap" in warned["message"]
    assert uncaught["level"] == "critical" and "KeyError: 'lost'" in uncaught["exception"]


def test_log_colours_are_used_only_on_terminals_that_allow_them(monkeypatch: pytest.MonkeyPatch, log: Log) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def coloured(stream: io.StringIO) -> bool:
        logs.configure(LogSettings(), "test", stream)
        logging.getLogger("fastblt").warning("look")
        return "\x1b[33m" in text(stream)

    log("human", "info")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert coloured(Terminal()) and not coloured(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not coloured(Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not coloured(Terminal())


def test_control_characters_in_log_messages_are_escaped() -> None:
    record = logging.makeLogRecord({"msg": "\x1b[2Jgone", "levelname": "INFO", "name": "fastblt"})
    assert "\x1b" not in HumanFormatter(colour=False).format(record)


@pytest.mark.parametrize("format", ["human", "json"])
def test_dropped_log_lines_are_reported_in_the_format_of_the_log(log: Log, format: FormatName) -> None:
    stream = log(format, "error")
    assert logs.dropped() == 0
    token = logs.context.set({"request_id": "r-1"})
    logging.getLogger("fastblt").error("x" * LIMIT_BYTES)
    logs.context.reset(token)
    assert "r-1" not in text(stream) and logs.dropped() == 1
    if format == "json":
        (line,) = lines(stream)
        assert (line["level"], line["process"], line["logger"]) == ("warning", "test", "fastblt.logs")
        assert line["message"] == "1 log line was dropped: nothing read the log" and line["dropped_lines"] == 1
    else:
        told = text(stream).split(maxsplit=3)
        assert told[1:] == ["WARNING", "logs", "1 log line was dropped: nothing read the log\n"]


def test_a_log_line_that_cannot_be_formatted_is_logged_as_an_error(log: Log) -> None:
    stream = log("json", "info")
    logging.getLogger("fastblt.x").info("%d", "secret")
    (line,) = lines(stream)
    assert (line["level"], line["logger"], line["message"]) == ("error", "fastblt.x", "a log line could not be made")
    assert "TypeError" in line["exception"] and "secret" not in line["exception"]


def test_configuring_logs_again_writes_queued_lines_and_leaves_one_thread(log: Log) -> None:
    before = threading.active_count()
    for _ in range(3):
        stream = log("human", "info")
        logging.getLogger("fastblt").info("said")
    log("human", "info")
    assert stream.getvalue().count("said") == 1
    assert threading.active_count() == before + 1


@pytest.mark.parametrize(
    ("last", "code"), [("log.critical('said'); raise SystemExit(3)", 3), ("raise KeyError('said')", 1)]
)
def test_the_last_log_line_of_a_process_is_written(last: str, code: int) -> None:
    first = "import logging; from engine import logs; logs.configure(logs.LogSettings(format='json'), 'test')"
    program = f"{first}; log = logging.getLogger('fastblt'); {last}"
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=60)
    (line,) = map(json.loads, ended.stderr.splitlines())
    assert ended.returncode == code
    assert line["level"] == "critical" and "said" in line["message"] + line.get("exception", "")
