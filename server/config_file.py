"""Settings in a YAML file: one mapping, whose keys are flags without the leading dashes.

A value is read as the text that a flag or a variable would hold, so `port: 8000` and `port: "8000"` are the same, and
`served-model-name: no` is a name and not false. Only an unquoted null differs from text. Values are taken from the
parsed document's nodes: no object is constructed, no merge key is followed and no alias multiplies.
"""

import re
import stat
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import yaml

from .nearest import nearest

MOST_BYTES = 1 << 20
"""Largest file."""
HIDDEN = "<hidden>"
"""Stands for a secret in what `--print-config` prints."""
_YAML = "tag:yaml.org,2002:"
_NULL = f"{_YAML}null"
_TEXTS = {f"{_YAML}{kind}" for kind in ("bool", "float", "int", "merge", "str", "timestamp", "value")}

Value = str | list[str] | None


class ConfigError(ValueError):
    """The file cannot be used. The message begins with its name, and has the line if there is one."""


class Entry(NamedTuple):
    """A value of the file. line: of its key, from 1."""

    value: Value
    line: int


def read_config(path: Path, known: Collection[str]) -> dict[str, Entry]:
    """The values by name of the setting. known: names that may occur, with `_`; the file may write `-` instead.

    Raises ConfigError.
    """
    try:
        document = yaml.compose(_text(path), yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}, line {mark.line + 1}" if mark else f"{path}"
        # Without the name of an alias: a key that begins with * looks like one.
        problem = re.sub("(?<=undefined alias) .*", "", error.problem or error.context or "", flags=re.DOTALL)
        raise ConfigError(f"{where}: is not valid YAML: {problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{path}: must be one mapping such as 'port: 8000', not nested so deeply") from None
    if document is None or document.tag == _NULL:
        return {}
    if not isinstance(document, yaml.MappingNode) or document.tag != f"{_YAML}map":
        raise ConfigError(f"{path}: must be one mapping such as 'port: 8000', not a {_kind(document)}")
    entries: dict[str, Entry] = {}
    for key, node in document.value:
        line = key.start_mark.line + 1
        where = f"{path}, line {line}"
        written = str(key.value) if isinstance(key, yaml.ScalarNode) else f"a {_kind(key)} as a key"
        name = written.replace("-", "_")
        if name not in known:
            raise ConfigError(f"{where}: {_short(written)} is not a setting{_nearest(name, known)}")
        if name in entries:
            raise ConfigError(f"{where}: {written} is already in line {entries[name].line}; keep one of them")
        entries[name] = Entry(_value(node, f"{where}: {written}"), line)
    return entries


def write_line(name: str, value: Value | bool | float, comment: str) -> str:
    """A line of a file that `read_config` reads as this value."""
    if isinstance(value, str | list):
        # With other quotes PyYAML loses some kinds of line ends.
        style = None if "".join(value).isprintable() else '"'
        # In brackets, as a list of several lines would leave no place for the comment.
        shown = yaml.safe_dump(
            [value], default_flow_style=True, default_style=style, allow_unicode=True, width=float("inf")
        ).strip()[1:-1]
    else:
        shown = "null" if value is None else str(value).lower()
    return f"{name.replace('_', '-')}: {shown}  # {comment}\n"


def _text(path: Path) -> str:
    """The file's text. Raises ConfigError."""
    try:
        # Before it is opened: a FIFO would wait for a writer.
        if not stat.S_ISREG(path.stat().st_mode):
            kind = "a folder" if path.is_dir() else "a FIFO or a device"
            raise ConfigError(f"{path}: must be a regular file, not {kind}")
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(data) > MOST_BYTES:
        raise ConfigError(f"{path}: must hold at most {MOST_BYTES} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}, line {line}: must be UTF-8, which the byte {data[error.start]:#x} is not") from None


def _value(node: yaml.Node, where: str) -> Value:
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{_YAML}seq":
        return [_scalar(item, f"{where}: each item") for item in node.value]
    return None if node.tag == _NULL else _scalar(node, where)


def _scalar(node: yaml.Node, where: str) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise ConfigError(f"{where} must be one value or a list of them, not a {_kind(node)}")
    if node.tag not in _TEXTS:
        kind = "null" if node.tag == _NULL else "a value with a tag; text that begins with ! needs quotes"
        raise ConfigError(f"{where} must be text or a number, not {kind}")
    return str(node.value)


def _kind(node: yaml.Node) -> str:
    """YAML's word for it: scalar, sequence or mapping."""
    return type(node).__name__.removesuffix("Node").lower()


def _nearest(name: str, known: Collection[str]) -> str:
    found = nearest(name, known)
    return f"; did you mean {found.replace('_', '-')}?" if found else "; names are those of the flags"


def _short(text: str) -> str:
    return repr(text[:80]) + "..." * (len(text) > 80)
