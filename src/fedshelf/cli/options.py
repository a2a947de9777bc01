"""Generates command-line flags from the configuration schema."""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from fedshelf.config.files import load
from fedshelf.config.schema import RENAMED, Settings

BASIC: dict[str, tuple[str, ...]] = {
    "server": (
        "rounds", "min_clients", "address", "advertise", "test_dir", "run_dir", "model", "image_size", "local_epochs",
        "client_lr", "algorithm", "personalize", "seed",
    ),
    "simulate": (
        "data_dir", "test_dir", "rounds", "run_dir", "workers", "model", "image_size", "local_epochs", "client_lr",
        "algorithm", "personalize", "seed",
    ),
    "distill": (
        "teacher", "student", "data_dir", "test_dir", "rounds", "run_dir", "mode", "unlabelled_dir", "distill_weight",
        "temperature", "workers", "image_size", "seed",
    ),
    "client": ("data_dir", "server_address", "token", "name", "test_dir", "active_hours", "device"),
}  # fmt: skip
"""By command: the flags that `--help` shows, in this order; `--help-all` shows all."""

MAX_CHOICES = 24  # characters; longer lists of choices are in the flag's help
_METAVARS = {int: "N", float: "NUMBER", str: "TEXT", Path: "PATH"}


def with_options(
    kind: type[Settings], command: str, *, renamed: Mapping[str, str] = MappingProxyType({})
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add all flags of `kind` for `command`, and `--config FILE`, to a function `f(config, **own_options)`.

    A flag that is not given keeps the file's value or the default. Values are validated together with the file's.

    Args:
        kind: the settings class.
        command: the command's name.
        renamed: flags that this command calls by another name.

    Returns:
        The decorator.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = [p for name, p in inspect.signature(function).parameters.items() if name != "config"]
        names = flag_names(kind, command)
        former = {old: new for old, new in RENAMED.items() if new in names}
        offered = [_parameter(kind, name, called=renamed.get(name, name)) for name in names]
        offered += [_parameter(kind, new, called=old, hidden=True) for old, new in former.items()]

        @wraps(function)
        def run(**given: Any) -> None:
            file = given.pop("config_file")
            said = {name: given.pop(renamed.get(name, name)) for name in (*names, *former)}
            overrides = {name: value for name, value in said.items() if value is not None and value != []}
            function(config=load(kind, file, overrides), **given)

        parameters = [*offered, _config_file(), *own]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _config_file() -> inspect.Parameter:
    option = typer.Option(
        "--config", metavar="FILE", help="TOML file with any of these settings; flags take precedence."
    )
    return _keyword("config_file", Annotated[Path | None, option])


def flag_names(kind: type[Settings], command: str) -> list[str]:
    """The fields that a command has as flags: `distill` has those of `simulate`, too."""
    wanted = {command, *(["simulate"] if command == "distill" else [])}
    return [name for name, flag in kind.flags().items() if wanted.intersection(flag.commands)]


def _parameter(settings: type[Settings], name: str, *, called: str, hidden: bool = False) -> inspect.Parameter:
    """Create a field's flag, of any name."""
    field, flag = settings.model_fields[name], settings.flags()[name]
    dashed, text = f"--{called.replace('_', '-')}", flag.help
    kinds = [kind for kind in get_args(field.annotation) if kind is not type(None)] or [field.annotation]
    literals = [kind for kind in (field.annotation, *kinds) if get_origin(kind) is Literal]
    choices = [choice for literal in literals for choice in get_args(literal)]
    if bool in kinds:
        text += " [default: on]" * (field.default is True)
        option = typer.Option(
            f"{dashed}/--no-{dashed[2:]}", help=text, rich_help_panel=flag.panel, show_default=False,
            hidden=hidden,
        )  # fmt: skip
        return _keyword(called, Annotated[bool | None, option])  # both forms override a file
    metavar = "|".join([*choices, *(_METAVARS[kind] for kind in kinds if kind in _METAVARS)]) or "TEXT"
    if len(metavar) > MAX_CHOICES:
        metavar, text = "NAME", f"{text} One of: {', '.join(choices)}."
    if field.default not in (None, ()):
        text += f" [default: {field.default}]"
    option = typer.Option(
        dashed, help=text, rich_help_panel=flag.panel, show_default=False, metavar=metavar, hidden=hidden,
        autocompletion=(lambda: choices) if choices else None,
    )  # fmt: skip
    kind: Any = list[str] if get_origin(field.annotation) is tuple else Path if kinds[0] is Path else str
    return _keyword(called, Annotated[kind | None, option])


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
