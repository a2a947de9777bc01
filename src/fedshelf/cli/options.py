"""Flags from the configuration's schema: said once there, offered by every command that it names."""

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from fedshelf.config.files import load
from fedshelf.config.schema import RENAMED, Settings


def with_options(kind: type[Settings], command: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a function `f(config, **own options)` all flags that `kind` has for `command`, and `--config FILE`.

    A flag that is not given leaves the file's value, or else the default.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = [p for name, p in inspect.signature(function).parameters.items() if name != "config"]
        names = [name for name, flag in kind.flags().items() if command in flag.commands]
        former = {old: new for old, new in RENAMED.items() if new in names}
        offered = [_parameter(kind, name) for name in names]
        offered += [_parameter(kind, new, former=old) for old, new in former.items()]

        @wraps(function)
        def run(**given: Any) -> None:
            file = given.pop("config_file")
            said = {name: given.pop(name) for name in (*names, *former)}
            overrides = {name: value for name, value in said.items() if value is not None}
            function(config=load(kind, file, overrides), **given)

        parameters = [*offered, _config_file(), *own]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _config_file() -> inspect.Parameter:
    option = typer.Option("--config", metavar="FILE", help="TOML file with any of these flags; flags win.")
    return _keyword("config_file", Annotated[Path | None, option])


def _parameter(settings: type[Settings], name: str, *, former: str = "") -> inspect.Parameter:
    """A field's flag; under its `former` name a hidden one."""
    field, flag, called = settings.model_fields[name], settings.flags()[name], former or name
    dashed = f"--{called.replace('_', '-')}"
    kind: Any = field.annotation
    is_switch = bool in (kind, *get_args(kind))
    names = [f"{dashed}/--no-{dashed[2:]}"] if is_switch else [dashed]  # either wins over a file
    silent = field.default is None or is_switch
    text = flag.help if silent else f"{flag.help} (default {field.default})"
    option = typer.Option(*names, help=text, rich_help_panel=flag.panel, show_default=False, hidden=bool(former))
    return _keyword(called, Annotated[kind | None, option])


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
