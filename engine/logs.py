"""Log lines of both processes: for people, or one JSON object each for machines.

A message has all that a person needs. Numbers for machines are passed as `extra`, and only JSON lines have them.
Neither may contain the content of a client's request.

A line is formatted in the thread that logs it, where the request is known, and written by another (`log_writer`).
"""

import json
import logging
import os
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType, TracebackType
from typing import IO, Any, Literal

import msgspec

from .process.log_writer import LogWriter

LevelName = Literal["debug", "info", "warning", "error"]
FormatName = Literal["human", "json"]

context: ContextVar[Mapping[str, str]] = ContextVar("log context", default=MappingProxyType({}))
"""Fields of every line that is logged for the current request."""

LAST_SECONDS = 1.0
"""To write the lines that still wait when the process ends or logging is configured again."""

_OWN = frozenset([*vars(logging.makeLogRecord({})), "message", "asctime"])
"""Attributes of every record; any other is a field passed as `extra`."""


class LogSettings(msgspec.Struct, frozen=True):
    """What is logged, and how it looks."""

    level: LevelName = "info"
    format: FormatName = "human"


def configure(settings: LogSettings, process: str, stream: IO[str] | None = None) -> None:
    """Logs to `stream` (standard error) from now on, Python's warnings and uncaught exceptions too."""
    stream = stream or sys.stderr
    colour = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    handler = _Handler(stream, JsonFormatter(process) if settings.format == "json" else HumanFormatter(colour))
    logging.basicConfig(handlers=[handler], force=True)
    set_level(settings.level)
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught


def set_level(name: LevelName) -> None:
    """Logs lines of at least this severity from now on."""
    level = getattr(logging, name.upper())
    # Debug lines of other libraries may contain any content, and are never logged.
    logging.getLogger().setLevel(max(level, logging.INFO))
    logging.getLogger("fastblt").setLevel(level)


def flush(seconds: float = LAST_SECONDS) -> None:
    """Waits up to `seconds` until all lines are written."""
    for handler in _handlers():
        handler.writer.flush(seconds)


def dropped() -> int:
    """How many lines of this process were dropped, because the log was not read and too many lines waited."""
    return sum(handler.writer.dropped for handler in _handlers())


class JsonFormatter(logging.Formatter):
    """Time, level, process, logger and message, then the fields of the request and of the line, then the exception."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "process": self._process,
            "pid": record.process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in _fields(record).items():
            line.setdefault(name, value)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        # All but ASCII is escaped: some readers take U+2028 for a line break.
        return json.dumps(line, default=str, separators=(",", ":"))


class HumanFormatter(logging.Formatter):
    """Columns of time, level and logger, then the message and the request's id. Only a traceback takes more lines."""

    COLOURS = {"DEBUG": "2", "INFO": "32", "WARNING": "33", "ERROR": "1;31", "CRITICAL": "1;37;41"}

    def __init__(self, colour: bool) -> None:
        super().__init__()
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        level = self._paint(f"{record.levelname:<7}", self.COLOURS.get(record.levelname, "0"))
        logger = self._paint(f"{record.name.removeprefix('fastblt.'):<14}", "36")
        line = f"{self._paint(_time(record), '2')} {level} {logger} {_printable(record.getMessage().rstrip())}"
        if request_id := _fields(record).get("request_id"):
            line += "  " + self._paint(request_id, "2")
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line

    def _paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour else text


class _Handler(logging.Handler):
    """Formats a line in the thread that logs it, and passes it to a writer.

    `logging` closes it at the very end of the process, and when it is configured again.
    """

    def __init__(self, stream: IO[str], formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self.writer = LogWriter(stream, self._note)

    def createLock(self) -> None:
        """None: the writer has its own lock. With two, the writer's thread and a thread that logs could wait for each
        other, when the garbage collector runs code that logs."""
        self.lock = None

    def handle(self, record: logging.LogRecord) -> bool:
        self.emit(record)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:
            # The default of `logging` would wait for the reader, and write the arguments, which may be content.
            line = self._line(logging.ERROR, record.name, "a log line could not be made", exc_info=sys.exc_info())
        self.writer.put(line)

    def close(self) -> None:
        self.writer.close(LAST_SECONDS)
        super().close()

    def _note(self, lines: int) -> str:
        """The line in place of dropped ones. It is written at any level: each of them would have been."""
        message = f"{lines} log {'line was' if lines == 1 else 'lines were'} dropped: nothing read the log"
        return self._line(logging.WARNING, "fastblt.logs", message, dropped_lines=lines)

    def _line(self, level: int, logger: str, message: str, **fields: Any) -> str:
        about = {"name": logger, "levelno": level, "levelname": logging.getLevelName(level), "msg": message}
        return self.format(logging.makeLogRecord(about | fields))


def _handlers() -> list[_Handler]:
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, _Handler)]


def _time(record: logging.LogRecord) -> str:
    """RFC 3339, UTC, milliseconds."""
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {**context.get(), **{name: value for name, value in vars(record).items() if name not in _OWN}}


def _printable(text: str) -> str:
    """On one line, and without a terminal's control characters."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logging.getLogger("fastblt").critical("uncaught %s", kind.__name__, exc_info=(kind, error, trace))
