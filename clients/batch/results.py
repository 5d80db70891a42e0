"""The output of a batch: one answer a line, appended as it comes, so that a killed run loses none."""

import fcntl
import json
import os
import stat
import uuid
from pathlib import Path
from typing import Any, BinaryIO

from .index import Index

START = b'{"id": "batch_req_'
"""How every line of ours begins, which tells a torn last line from another program's file."""
TAIL = 1 << 16
"""Bytes read at a time to find the last line's start."""


class BatchError(Exception):
    """What stops a batch before its end."""


def answer(custom_id: str | None, status: int, request_id: str | None, body: Any) -> dict[str, Any]:
    """A line for a request that the server has answered, also with an error."""
    return _result(custom_id, {"status_code": status, "request_id": request_id, "body": body}, None)


def failure(
    custom_id: str | None, code: str, message: str, line: int | None = None, param: str | None = None
) -> dict[str, Any]:
    """A line for a request without an answer. line: of the input, if that line itself is wrong."""
    return _result(custom_id, None, {"code": code, "message": message, "param": param, "line": line})


def is_good(result: dict[str, Any]) -> bool:
    """Whether the server answered with 200."""
    response = result["response"]
    return response is not None and response["status_code"] == 200


def _result(custom_id: str | None, response: Any, error: Any) -> dict[str, Any]:
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": error}


class Results:
    """Appends to a file. Nothing is buffered here: what `write` has returned from survives the end of this process."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    @classmethod
    def open(cls, path: Path) -> "Results":
        """Repairs a torn last line. Raises BatchError for a file that another run writes, or that is no batch's
        output; OSError."""
        file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _repair(file, path)
        except BlockingIOError:
            file.close()
            raise BatchError(f"{path}: another batch is writing to this file") from None
        except BaseException:
            file.close()
            raise
        return cls(file)

    def read_into(self, index: Index, path: Path) -> int:
        """Tells the index what is answered, and returns how many lines are no good answers. Raises BatchError."""
        bad = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    result = json.loads(line)
                    refused = (result["error"] or {}).get("line")
                    bad += not is_good(result)
                    custom_id = result["custom_id"]
                except (ValueError, LookupError, TypeError, AttributeError):
                    raise _foreign(path, number) from None
                if isinstance(refused, int):
                    index.add_refused(refused)
                elif isinstance(custom_id, str):
                    index.add_answered(custom_id)
                else:
                    raise _foreign(path, number)
        return bad

    def write(self, result: dict[str, Any]) -> None:
        rest = memoryview(json.dumps(result).encode() + b"\n")
        while rest:
            rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        """Also waits for the disk, where the output is a file."""
        with self._file as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                os.fsync(file.fileno())


def _foreign(path: Path, line: int) -> BatchError:
    return BatchError(f"{path}: line {line} is not an answer of a batch; name a new file or an earlier run's output")


def _repair(file: BinaryIO, path: Path) -> None:
    """Completes or removes a last line without an end."""
    size = start = file.seek(0, os.SEEK_END)
    last = b""
    while start and b"\n" not in last:
        step = min(TAIL, start)
        start -= step
        file.seek(start)
        last = file.read(step) + last
    last = last.rpartition(b"\n")[2]
    if not last:
        return
    if last[: len(START)] != START[: len(last)]:
        raise BatchError(f"{path}: the last line is not an answer of a batch; name a new file or an earlier output")
    try:
        json.loads(last)
    except ValueError:
        file.truncate(size - len(last))
    else:
        file.write(b"\n")
