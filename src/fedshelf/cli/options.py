"""Flags from the configuration's schema: said once there, offered by every command that it names."""

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

from fedshelf.config.files import load
from fedshelf.config.schema import Settings


def with_options(kind: type[Settings], command: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a function `f(config, **own options)` all flags that `kind` has for `command`, and `--config FILE`.

    A flag that is not given leaves the file's value, or else the default.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = [p for name, p in inspect.signature(function).parameters.items() if name != "config"]
        offered = [_parameter(kind, name) for name, flag in kind.flags().items() if command in flag.commands]
        names = {parameter.name for parameter in offered}

        @wraps(function)
        def run(**given: Any) -> None:
            file = given.pop("config_file")
            said = {name: given.pop(name) for name in names}
            overrides = {name: value for name, value in said.items() if value is not None and value != []}
            function(config=load(kind, file, overrides), **given)

        parameters = [*offered, _config_file(), *own]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _config_file() -> inspect.Parameter:
    option = typer.Option("--config", metavar="FILE", help="TOML file with any of these flags; flags win.")
    return _keyword("config_file", Annotated[Path | None, option])


def _parameter(settings: type[Settings], name: str) -> inspect.Parameter:
    field, flag = settings.model_fields[name], settings.flags()[name]
    dashed = f"--{name.replace('_', '-')}"
    kind: Any = list[str] if get_origin(field.annotation) is tuple else field.annotation
    is_switch = bool in (kind, *get_args(kind))
    names = [f"{dashed}/--no-{dashed[2:]}"] if is_switch else [dashed]  # either wins over a file
    silent = field.default in (None, ()) or is_switch
    text = flag.help if silent else f"{flag.help} (default {field.default})"
    option = typer.Option(*names, help=text, rich_help_panel=flag.panel, show_default=False)
    return _keyword(name, Annotated[kind | None, option])


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
