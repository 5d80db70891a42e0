"""Where a setting's value comes from: a flag, else the environment, else the file of --config, else the default."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import typer
from pydantic import BaseModel, SecretStr, ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource

from .config_file import HIDDEN, ConfigError, read_config, write_line
from .settings import ServerSettings

M = TypeVar("M", bound=BaseModel)
Origin = Literal["flag", "environment", "file"]
IN_URL = re.compile(r"(?<=://).*(?=@)", re.DOTALL)
"""User and password of a URL."""


@dataclass(frozen=True, slots=True)
class Sources:
    """What was given, by the names of settings. lines: of the values in the file `path`."""

    values: dict[str, Any]
    origins: dict[str, Origin]
    path: Path | None
    lines: dict[str, int]

    def make(self, kind: type[M]) -> M:
        """The settings of one kind. Raises typer.BadParameter."""
        given = {name: self.values[name] for name in kind.model_fields if name in self.values}
        for name, value in given.items():
            if self._in_file(name) and HIDDEN in str(value):
                message = f"holds {HIDDEN}, which --print-config writes for a secret; write the secret there"
                raise typer.BadParameter(f"{message} or in {variable(name)}", param_hint=self._place(name))
        try:
            return kind(**given)
        except ValidationError as error:
            raise self._complaint(error, kind) from None

    def explained(self, message: str) -> str:
        """The message of an error that a value caused later, with where the settings that it names come from.

        A message names a setting as its flag, as `two_words`, with its value after its name, or with its value as the
        first word. A flag needs no explanation.
        """
        places = "; ".join(
            f"{name.replace('_', '-')} from {self._origin(name)}"
            for name, origin in self.origins.items()
            if origin != "flag" and self._named(name, message)
        )
        return f"{message} ({places})" if places else message

    def printed(self, settings: Sequence[Any]) -> str:
        """All settings as a file for --config, each with its origin.

        A secret is replaced by HIDDEN, which no file may hold: a file from which keys were only left out would open the
        server to all.
        """
        return "".join(
            write_line(name, _shown(value), self.origins.get(name, "default"))
            for part in settings
            for name, value in _items(part)
        )

    def _complaint(self, error: ValidationError, kind: type[BaseModel]) -> typer.BadParameter:
        """The first complaint with the value, unless the setting is a secret, and where it is."""
        from .errors import PLAINER, shown

        first = error.errors(include_url=False, include_input=False)[0]
        message = re.sub("^(value|Input) is not ", "must be ", re.split(", unable to | for <class", first["msg"])[0])
        for theirs, ours in PLAINER.items():
            message = message.replace(theirs, ours, 1)
        message = message[:1].lower() + message[1:]
        if not first["loc"]:
            # About several settings, which it names.
            words = {word.strip("_") for word in re.findall(r"\w+", message.replace("-", "_"))}
            places = "; ".join(self._place(name) for name in self.lines if name in words and self._in_file(name))
            return typer.BadParameter(f"{message} ({places})" if places else message)
        name = str(first["loc"][0])
        # Our own validators name the value.
        named = first["type"] == "value_error"
        if not named and "Secret" not in str(kind.model_fields[name].annotation):
            message += f", not {shown(self.values[name])}"
        return typer.BadParameter(message, param_hint=self._place(name))

    def _origin(self, name: str) -> str:
        if self._in_file(name):
            return f"{self.path}, line {self.lines[name]}"
        return f"the environment variable {variable(name)}"

    def _named(self, name: str, message: str) -> bool:
        value = self.values[name]
        # A path is also written without what pathlib drops from it.
        texts = {re.escape(text) for text in (value, str(Path(value)))} if isinstance(value, str) and value else ()
        after_name, first = [f"{name} {text}" for text in texts], [f"^{text}(?=[:/])" for text in texts]
        ways = "|".join([f"--{name.replace('_', '-')}", *([name] if "_" in name else []), *after_name, *first])
        return re.search(rf"(?<![\w-])({ways})(?![\w-])", message) is not None

    def _in_file(self, name: str) -> bool:
        return self.origins.get(name) == "file"

    def _place(self, name: str) -> str:
        flag = name.replace("_", "-")
        if self._in_file(name):
            return f"{flag} in {self.path}, line {self.lines[name]}"
        return f"--{flag} (or {variable(name)})"


def gather(path: Path | None, flags: Mapping[str, Any], kinds: Sequence[type[BaseSettings]]) -> Sources:
    """All that was given. Raises typer.BadParameter for a file that cannot be used."""
    try:
        entries = read_config(path, [name for kind in kinds for name in kind.model_fields]) if path else {}
    except ConfigError as error:
        raise typer.BadParameter(str(error), param_hint=f"--config (or {variable('config')})") from None
    environment: dict[str, Any] = {}
    for kind in kinds:
        environment |= EnvSettingsSource(kind)()
    values: dict[str, Any] = {name: entry.value for name, entry in entries.items()}
    origins: dict[str, Origin] = {}
    by_rank: list[tuple[Mapping[str, Any], Origin]] = [(values, "file"), (environment, "environment"), (flags, "flag")]
    for found, origin in by_rank:
        origins |= dict.fromkeys(found, origin)
    lines = {name: entry.line for name, entry in entries.items()}
    return Sources(values | environment | dict(flags), origins, path, lines)


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return f"{ServerSettings.model_config['env_prefix']}{name}".upper()


def _items(settings: Any) -> Iterator[tuple[str, Any]]:
    names = [field.name for field in fields(settings)] if is_dataclass(settings) else type(settings).model_fields
    for name in names:
        yield name, getattr(settings, name)


def _shown(value: Any) -> Any:
    """As `write_line` takes it, without secrets."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, list):
        return [_shown(item) for item in value]
    return HIDDEN if isinstance(value, SecretStr) else IN_URL.sub(HIDDEN, str(value))
