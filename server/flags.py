"""Command-line flags made from the typed settings, so that a default or a description is written once."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import Field, create_model
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from engine.config import EngineConfig, flag_help

from .embedded import NAME, embedded_model
from .settings import ServerSettings
from .sources import gather, variable

ENGINE_FLAGS = {field.name: field for field in fields(EngineConfig)}
"""By name; the metadata has the help and the least and the greatest value."""
EMBEDDED = f"{NAME}, which comes with fastblt"
"""The default of "model", for people."""
ConfigPath = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="YAML file of settings, named as their flags; a flag or a variable wins.",
        envvar=variable("config"),
        show_envvar=True,
    ),
]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Print all settings in force as a file for --config, and exit.")
]
_TYPES: dict[str, Any] = {
    name: (field.type, Field(None, ge=field.metadata["least"], le=field.metadata["most"]))
    for name, field in ENGINE_FLAGS.items()
}


class _OfEngine(BaseSettings):
    """From arguments, else from the environment, in which an empty variable counts for nothing. Fields that are in
    neither are None, whatever their type."""

    model_config = ServerSettings.model_config | SettingsConfigDict(env_ignore_empty=True, validate_default=False)


_Engine: type[BaseSettings] = create_model("_Engine", __base__=_OfEngine, **_TYPES)
"""The fields of EngineConfig, checked."""


def with_settings(command: Callable[..., None], *further: type[BaseSettings]) -> Callable[..., None]:
    """The command, which takes ServerSettings, EngineConfig, one of each of `further`, and `explain`.

    It has one flag per field of all, --config and --print-config. A flag that is not given leaves the environment
    (FASTBLT_ and the field's name) in force, else the file of --config, else the field's default. `explain` adds to an
    error's message where the settings that it names come from.
    """
    of_http: list[type[BaseSettings]] = [ServerSettings, *further]
    parameters = [_keyword("config", ConfigPath), _keyword("print_config", PrintConfig, False)]
    parameters += [_engine_parameter(name) for name in ENGINE_FLAGS]
    parameters += [_setting_parameter(name, info) for kind in of_http for name, info in kind.model_fields.items()]

    def run(config: Path | None, print_config: bool, **given: Any) -> None:
        given = {name: value for name, value in given.items() if value not in (None, [])}
        # As in the environment, so that one flag may also hold several values.
        given = {name: ",".join(value) if isinstance(value, list) else value for name, value in given.items()}
        sources = gather(config, given, [_Engine, *of_http])
        of_engine = sources.make(_Engine).model_dump(exclude_unset=True)
        engine = EngineConfig(**({"model": str(embedded_model())} | of_engine))
        settings = [sources.make(kind) for kind in of_http]
        if print_config:
            typer.echo(sources.printed([engine, *settings]).encode(), nl=False)
        else:
            command(settings[0], engine, *settings[1:], explain=sources.explained)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__doc__ = command.__doc__
    return run


def _engine_parameter(name: str) -> inspect.Parameter:
    field = ENGINE_FLAGS[name]
    # The model alone has no default that is the same on every machine.
    shown = EMBEDDED if field.default is MISSING else field.default
    default = None if shown is None else str(shown)
    least, most = field.metadata["least"], field.metadata["most"]
    help_text = flag_help(name)
    if least is not None:
        # Checked later, where the error can name the value.
        limits = f"at least {least}" if most is None else f"from {least} to {most}"
        if default is None:
            help_text += f" [{limits}]"
        else:
            default += f"; {limits}"
    return _parameter(name, _plain(field.type), help_text, default)


def _setting_parameter(name: str, info: FieldInfo) -> inspect.Parameter:
    assert info.description is not None
    default = None if info.default in (None, []) else str(info.default)
    kind = _plain(info.annotation)
    several = " May be repeated." if get_origin(kind) is list else ""
    return _parameter(name, kind, f"{info.description}{several}", default)


def _parameter(name: str, kind: Any, help_text: str, default: str | None) -> inspect.Parameter:
    """A switch, or a flag that takes text: the settings check values, and read the environment, themselves."""
    flag = name.replace("_", "-")
    declared = f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}"
    help_text += f" [env var: {variable(name)}]"
    if default is not None:
        help_text += f" [default: {default}]"
    option = typer.Option(declared, help=help_text, metavar=_metavar(kind), show_default=False)
    taken = kind if kind in (bool, list[str]) else str
    return _keyword(name, Annotated[taken | None, option])


def _metavar(kind: Any) -> str | None:
    """As typer shows the type, which it is not told."""
    if kind in (bool, list[str]):
        return None
    return f"<{'|'.join(get_args(kind)) if get_origin(kind) is Literal else kind.__name__.lower()}>"


def _keyword(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _plain(annotation: Any) -> Any:
    """The type as a command line gives it: without None, lists as text."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        (kind,) = (arg for arg in get_args(annotation) if arg is not type(None))
        return _plain(kind)
    if get_origin(annotation) is list:
        return list[str]
    assert get_origin(annotation) is Literal or isinstance(annotation, type)
    return annotation
