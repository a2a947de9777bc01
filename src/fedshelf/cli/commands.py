"""Formats the commands' help and usage errors.

For commands with many flags, `--help` shows those needed for a first run (`options.BASIC`) and `--help-all` shows all,
grouped by topic. Help is plain text, wrapped between words at the terminal's width or `MAX_WIDTH`.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import click
import typer
from typer.core import TyperCommand, TyperGroup

from fedshelf.cli.options import BASIC
from fedshelf.core.text import did_you_mean
from fedshelf.tracking.terminal import GLUE, continued, wrapped

MAX_WIDTH = 100
INDENT, MAX_TERM = "  ", 26  # a longer flag is on a line of its own
EXAMPLE, QUOTE = "Example: ", "'"
_TYPES = {"integer": "N", "integer range": "N", "float": "NUMBER", "float range": "NUMBER"}


class Commands(typer.Typer):
    """A `typer.Typer` whose commands use this help format."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(cls=Group, no_args_is_help=True, rich_markup_mode=None, **settings)

    def command(  # type: ignore[override]  # the settings are those of typer
        self, name: str | None = None, **settings: Any
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register a function as a command; see `typer.Typer.command`."""
        return super().command(name, **{"cls": Command, **settings})


class BadParametersError(click.UsageError):
    """Several arguments or flags of one command are missing, or have a wrong value.

    Attributes:
        errors: one for each.
    """

    def __init__(self, errors: Sequence[click.UsageError], ctx: click.Context) -> None:
        super().__init__("; ".join(error.format_message() for error in errors), ctx)
        self.errors = tuple(errors)


class Command(TyperCommand):
    """A command with a short and a full help text."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command line; see `click.Command.parse_args`.

        Raises:
            BadParametersError: lists all values that are wrong or missing, where click stops at the first one.
        """
        try:
            return super().parse_args(ctx, list(args))
        except click.BadParameter as error:
            given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
            raise BadParametersError([*_wrong(self, ctx, given)] or [error], ctx) from None

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the command's parameters, plus `--help-all` if `--help` does not show them all."""
        params = super().get_params(ctx)
        return [*params, _HELP_ALL] if self.name in BASIC else params

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help text."""
        formatter.write(help_text(ctx))


def _wrong(command: click.Command, ctx: click.Context, given: Mapping[str, Any]) -> Iterator[click.BadParameter]:
    """What is wrong with each of a command's arguments and flags, in their order."""
    for param in command.get_params(ctx):
        try:
            if not param.is_eager:
                param.handle_parse_result(ctx, given, [])
        except click.BadParameter as error:
            yield error


class Group(TyperGroup):
    """A group of commands in the same help format."""

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help text."""
        formatter.write(help_text(ctx))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:  # fmt: skip
        """Find the command that `args` name.

        Raises:
            click.UsageError: there is no such command.
        """
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            known = ", ".join(self.list_commands(ctx))
            near = did_you_mean(args[0], self.list_commands(ctx)) or f": the commands are {known}"
            raise click.UsageError(f"unknown command {args[0]!r}{near}", ctx)
        return super().resolve_command(ctx, args)


def _show_all(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(help_text(ctx, everything=True), nl=False)
        ctx.exit()


_HELP_ALL = click.Option(
    ["--help-all"], is_flag=True, is_eager=True, expose_value=False, callback=_show_all, help="Show all flags."
)


def help_text(ctx: click.Context, *, everything: bool = False) -> str:
    """Return a command's help.

    Args:
        ctx: the command's context.
        everything: show all flags by topic instead of only the basic ones.

    Returns:
        The text.
    """
    command, width = ctx.command, min(shutil.get_terminal_size().columns, MAX_WIDTH)
    summary, *before = _paragraphs(command.help)
    blocks = [wrapped(summary, width), [" ".join(command.get_usage(ctx).split())]]
    blocks += [wrapped(text, width) for text in before if not text.startswith(EXAMPLE)]
    for title, rows in _sections(ctx, everything=everything):
        blocks.append([f"{title}:", *_definitions(rows, width)])
    blocks += [_example(text, width) for text in before if text.startswith(EXAMPLE)]
    blocks += [(_example if text.startswith(EXAMPLE) else wrapped)(text, width) for text in _paragraphs(command.epilog)]
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def describe(parameter: click.Parameter) -> tuple[str, str]:
    """Describe a parameter.

    Returns:
        The flag (such as `--rounds N`), and its help with the default.
    """
    kind = parameter.type
    metavar = parameter.metavar or _TYPES.get(kind.name, kind.name.upper())
    if isinstance(kind, click.Choice) and not parameter.metavar:
        metavar = "|".join(map(str, kind.choices))
    text = getattr(parameter, "help", None) or ""
    if isinstance(parameter, click.Argument):
        return parameter.metavar or str(parameter.name).upper(), text
    names = ", ".join(sorted(parameter.opts, key=len))
    if parameter.secondary_opts:
        names += f" / {parameter.secondary_opts[0]}"
    if not getattr(parameter, "is_flag", False):
        names += f" {metavar}"
        if parameter.default is not None and getattr(parameter, "show_default", False):
            text += f" [default: {parameter.default}]"
    return names, f"{text} [required]" if parameter.required else text


def usage_error_message(error: click.UsageError) -> str:
    """Describe a usage error in one sentence."""
    ctx = error.ctx
    if isinstance(error, click.NoSuchOption) and ctx is not None:
        return f"unknown flag {error.option_name!r}" + (
            _elsewhere(error.option_name, ctx)
            or did_you_mean(error.option_name, [name for p in ctx.command.get_params(ctx) for name in p.opts])
        )
    if isinstance(error, click.BadOptionUsage):
        return f"{error.option_name} {'takes no' if 'not take' in error.message else 'needs a'} value"
    if isinstance(error, click.MissingParameter) and error.param is not None:
        name, text = describe(error.param)
        kind = "argument" if isinstance(error.param, click.Argument) else "flag"
        return f"missing {kind} {name}: {text[:1].lower()}{text[1:].removesuffix(' [required]').rstrip('.')}"
    if isinstance(error, click.BadParameter) and error.param is not None:
        name = max(error.param.opts, key=len) if isinstance(error.param, click.Option) else describe(error.param)[0]
        separator = " does not match " if isinstance(error.param.type, click.DateTime) else " is not "
        value, _, problem = error.message.rpartition(separator)
        if wrong := _wrong_value(error.param.type, value.strip(QUOTE), problem):
            return f"{name} {value.strip(QUOTE)}: {wrong}"
        return f"{name}: {error.message.rstrip('.')}"
    return error.message[:1].lower() + error.message[1:].rstrip(".")


def _wrong_value(kind: "click.ParamType[Any]", value: str, problem: str) -> str:
    """Describe what is wrong with a date, a choice or a number; empty if click's message is about something else."""
    if isinstance(kind, click.DateTime):
        return "not a date. Write it as YYYY-MM-DD, such as 2026-11-30"
    if isinstance(kind, click.Choice):
        return f"must be one of {', '.join(map(str, kind.choices))}{did_you_mean(value, map(str, kind.choices))}"
    if isinstance(kind, click.IntRange) and problem.startswith("in the range"):
        is_less = kind.min is not None and int(value) < kind.min
        return f"must be at least {kind.min:,}" if is_less else f"must be at most {kind.max:,}"
    whole = "whole " * isinstance(kind, click.IntRange)
    return f"not a {whole}number" if problem.startswith(("a valid integer", "a valid float")) else ""


def _elsewhere(name: str, ctx: click.Context) -> str:
    """Describe which other commands have the flag `name`."""
    root = ctx.find_root().command
    commands = root.commands.items() if isinstance(root, click.Group) else ()
    having = [f"'fedshelf {other}'" for other, command in commands if any(name in p.opts for p in command.params)]
    return f" for '{ctx.command_path}': it belongs to {' and '.join(having)}" if having else ""


def _sections(ctx: click.Context, *, everything: bool) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield headings with their rows of two texts."""
    command, basic = ctx.command, BASIC.get(ctx.command.name or "", ())
    shown = [p for p in command.get_params(ctx) if not getattr(p, "hidden", False)]
    if arguments := [p for p in shown if isinstance(p, click.Argument)]:
        yield "Arguments", list(map(describe, arguments))
    if isinstance(command, click.Group):
        commands = ((name, command.get_command(ctx, name)) for name in command.list_commands(ctx))
        yield "Commands", [(name, _summary(found)) for name, found in commands if found and not found.hidden]
    options = [p for p in shown if isinstance(p, click.Option)]
    themes: dict[str, list[click.Option]] = {}
    if basic and not everything:
        first = [p for name in basic for p in options if p.name == name]
        themes["Options"] = [*first, *(p for p in options if not _theme(p))]
    else:
        for option in options:
            themes.setdefault(_theme(option) or "Options", []).append(option)
    for theme, found in themes.items():
        yield theme, list(map(describe, found))


def _paragraphs(text: str | None) -> list[str]:
    return [" ".join(paragraph.split()) for paragraph in (text or "").split("\n\n")] if text else []


def _theme(option: click.Option) -> str:
    return getattr(option, "rich_help_panel", None) or ""


def _summary(command: click.Command) -> str:
    return "".join(_paragraphs(command.help)[:1]).rstrip(".")


def _definitions(rows: Sequence[tuple[str, str]], width: int) -> Iterator[str]:
    """Lay out two columns: terms, and their wrapped texts."""
    column = max(len(term) for term, _ in rows if len(term) <= MAX_TERM or len(rows) == 1)
    indent = INDENT + " " * (min(column, MAX_TERM) + 2)
    for term, text in rows:
        lines = list(wrapped(text.replace("[default: ", f"[default:{GLUE}"), width, indent))
        if len(term) <= MAX_TERM:
            yield (f"{INDENT}{term}".ljust(len(indent)) + lines[0][len(indent) :]).rstrip()
            yield from lines[1:]
        else:
            yield from (INDENT + term, *lines)


def _example(text: str, width: int) -> Iterator[str]:
    """Lay out an example that can be pasted into a shell."""
    first, *more = continued(text.removeprefix(EXAMPLE), width, " " * len(EXAMPLE))
    yield from (EXAMPLE + first.lstrip(), *more)
