"""Command-line flags made from the typed settings, so that a default or a description is written once."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from engine.config import EngineConfig, flag_help

from .embedded import NAME, embedded_model
from .settings import ServerSettings

ENGINE_FLAGS = {field.name: field for field in fields(EngineConfig)}
"""By name; the metadata has help and least value."""
EMBEDDED = f"{NAME}, which comes with fastblt"
"""The default of "model", for people."""


def with_settings(command: Callable[..., None], *further: type[BaseSettings]) -> Callable[..., None]:
    """The command, which takes ServerSettings, EngineConfig and one of each of `further`, with one flag per field of
    all. A flag that is not given leaves the environment (FASTBLT_ and the field's name), and else the field's default,
    in force."""
    kinds: list[type[BaseSettings]] = [ServerSettings, *further]
    parameters = [_engine_parameter(name) for name in ENGINE_FLAGS]
    parameters += [_setting_parameter(name, info) for kind in kinds for name, info in kind.model_fields.items()]

    def run(**given: Any) -> None:
        given = {name: value for name, value in given.items() if value not in (None, [])}
        # As in the environment, so that one flag may also hold several values.
        given = {name: ",".join(value) if isinstance(value, list) else value for name, value in given.items()}
        of_engine = {name: given.pop(name) for name in ENGINE_FLAGS if name in given}
        config = EngineConfig(**({"model": str(embedded_model())} | of_engine))
        try:
            settings = [kind(**{name: given[name] for name in kind.model_fields if name in given}) for kind in kinds]
        except ValidationError as error:
            raise _bad_setting(error) from None
        command(settings[0], config, *settings[1:])

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__doc__ = command.__doc__
    return run


def _engine_parameter(name: str) -> inspect.Parameter:
    field = ENGINE_FLAGS[name]
    # The model alone has no default that is the same on every machine.
    shown = EMBEDDED if field.default is MISSING else field.default
    default = None if shown is None else str(shown)
    return _parameter(
        name, _plain(field.type), flag_help(name), default, envvar=_variable(name), least=field.metadata["least"]
    )


def _setting_parameter(name: str, info: FieldInfo) -> inspect.Parameter:
    assert info.description is not None
    default = None if info.default in (None, []) else str(info.default)
    kind = _plain(info.annotation)
    several = " May be repeated." if get_origin(kind) is list else ""
    # Only named here: settings read the environment themselves.
    help_text = f"{info.description}{several} [env var: {_variable(name)}]"
    return _parameter(name, kind, help_text, default)


def _parameter(
    name: str,
    kind: Any,
    help_text: str,
    default: str | None,
    *,
    envvar: str | None = None,
    least: int | None = None,
) -> inspect.Parameter:
    flag = name.replace("_", "-")
    declared = f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}"
    if default is not None:
        help_text += f" [default: {default}]"
    option = typer.Option(declared, help=help_text, envvar=envvar, show_envvar=True, min=least, show_default=False)
    annotation: Any = Annotated[kind | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _variable(name: str) -> str:
    return f"{ServerSettings.model_config['env_prefix']}{name}".upper()


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


def _bad_setting(error: ValidationError) -> typer.BadParameter:
    """The first complaint, by flag and variable, without the value: it may be a key."""
    first = error.errors(include_url=False, include_input=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if not first["loc"]:
        return typer.BadParameter(message)
    name = str(first["loc"][0])
    return typer.BadParameter(message, param_hint=f"--{name.replace('_', '-')} (or {_variable(name)})")
