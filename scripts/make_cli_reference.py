#!/usr/bin/env python3
"""Writes docs/reference/cli.md, docs/reference/configuration.md and the keys in flower/pyproject.toml from the commands
and the schema themselves.

python scripts/make_cli_reference.py            write them
python scripts/make_cli_reference.py --check    exit code 1 if one of them is out of date
"""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, get_args, get_origin

import click
import typer
from pydantic.fields import FieldInfo

from fedshelf.cli.app import app
from fedshelf.cli.commands import describe
from fedshelf.config.files import to_toml
from fedshelf.config.schema import ClientConfig, RunConfig, Settings
from fedshelf.core.settings import MAX_INTEGER, MAX_SEED, Scope, Setting

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "reference"
FLOWER_APP = ROOT / "flower" / "pyproject.toml"
FLOWER_TABLE = "[tool.flwr.app.config]\n"
NOT_FLOWERS = frozenset({
    "address", "admission", "advertise", "heartbeat_timeout", "home", "insecure", "invite", "tls_cert", "tls_key",
})  # fmt: skip
"""Keys of a server that a SuperLink has of its own."""
NOTICE = "<!-- Written by scripts/make_cli_reference.py: change the code, then run that. -->"

CLI_INTRODUCTION = """# Command line

All commands and flags. `fedshelf COMMAND --help` says the same; for `server`, `simulate` and `client` it shows the
flags that a first run needs, and `--help-all` shows all of them by theme.

Errors and warnings go to the standard error stream, one line each. On a terminal, lines break between words; a pipe, a
file or the journal of a service gets one line per event without colors or cursor movements. `COLUMNS` sets the width,
`NO_COLOR` and `TERM=dumb` switch colors off.

`python server.py …` and `python client.py …` in a clone are `fedshelf server …` and `fedshelf client …`.

| exit code | meaning |
|---|---|
| 0 | finished, or stopped on request |
| 1 | failed (for a client, also the run); the reason is on the standard error stream |
| 2 | wrong usage: nothing was started |
| 130 | stopped at once by a second Ctrl-C |

`$FEDSHELF_HOME` moves everything that FedShelf keeps for a user (certificates, identities, client states, decoded
photos); without it, that is where the system keeps application data, on Linux `~/.local/share/fedshelf`.
"""

CONFIGURATION_INTRODUCTION = """# Configuration

Every key can stand in a TOML file, given with `--config FILE`, or be a flag (`client-lr = 0.05` is
`--client-lr 0.05`). Flags win over the file, the file over the defaults. An unknown key is an error that names the
nearest right one, and all problems of a file are reported at once. Paths are relative to the folder in which the
command runs. [How to use a file](../how-to/use-a-run-toml.md) has an example.

The column *decides* says what a value is part of:

| decides | meaning |
|---|---|
| result, sent | part of the run's identity, and sent to every client |
| result | part of the run's identity; stays at the server |
| nothing | may differ when a run is resumed (`round-timeout` may not with `slowdowns`: there time decides) |

*The run's identity*: a run goes on only with the values it was begun with
([resume and extend](../how-to/resume-and-extend.md)).
"""

DECIDES = {Scope.RUN: "result, sent", Scope.SERVER: "result", Scope.LOCAL: "nothing"}
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def cli_page() -> str:
    """The reference of all commands as Markdown."""
    root = typer.main.get_command(app)
    context = click.Context(root, info_name="fedshelf", **root.context_settings)
    return "\n".join([NOTICE, "", CLI_INTRODUCTION, *_command(context)]).rstrip() + "\n"


def configuration_page() -> str:
    """The reference of all keys as Markdown."""
    lines = [NOTICE, "", CONFIGURATION_INTRODUCTION, "## A run: `simulate` and `server`", ""]
    lines += _keys(RunConfig, with_scope=True)
    lines += ["## A client: `client`", "", "These stay on the store's own machine.", ""]
    lines += _keys(ClientConfig, with_scope=False)
    return "\n".join(lines).rstrip() + "\n"


def flower_app() -> str:
    """The Flower app's project file, with all keys of a run and their defaults at its end (an empty text: not set)."""
    head, table, _ = FLOWER_APP.read_text(encoding="utf-8").partition(FLOWER_TABLE)
    names = [name for name, flag in RunConfig.flags().items() if "server" in flag.commands and name not in NOT_FLOWERS]
    defaults = {name.replace("_", "-"): RunConfig.model_fields[name].default for name in names}
    return head + table + to_toml({key: "" if default is None else default for key, default in defaults.items()})


def _command(context: click.Context) -> Iterator[str]:
    command = context.command
    if context.parent is not None:
        yield from (f"## {context.command_path}", "")
    yield from (*_text(command.help), *_text(command.epilog))
    rows = [_parameter(parameter) for parameter in command.get_params(context)]
    yield from (*_table(("argument or flag", "what it does"), (row for row in rows if row)), "")
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            if child is not None:
                yield from _command(click.Context(child, info_name=name, parent=context))


def _text(text: str | None) -> Iterator[str]:
    for paragraph in (text or "").split("\n\n"):
        plain = " ".join(paragraph.split())
        if plain.startswith(("Example: ", "Start with: ")):
            yield from ("```", plain.partition(": ")[2], "```", "")
        elif plain:
            yield from (plain, "")


def _parameter(parameter: click.Parameter) -> tuple[str, str] | None:
    if getattr(parameter, "hidden", False):
        return None
    name, what = describe(parameter)
    return ", ".join(f"`{part}`" for part in _alternatives(name)), what


def _alternatives(name: str) -> list[str]:
    """`-h, --help` and `--augment / --no-augment` as the two that they are."""
    separator = " / " if " / " in name else ", "
    return name.split(separator) if name.startswith("-") else [name]


def _keys(settings: type[Settings], *, with_scope: bool) -> Iterator[str]:
    flags = settings.flags()
    for panel in dict.fromkeys(flag.panel for flag in flags.values()):
        yield from (f"### {panel}", "")
        header = ["key", "value", "default", *(["decides"] if with_scope else []), "meaning"]
        rows = [
            _key(settings.model_fields[name], name, flag, with_scope=with_scope)
            for name, flag in flags.items()
            if flag.panel == panel
        ]
        yield from (*_table(header, rows), "")


def _key(field: FieldInfo, name: str, flag: Setting, *, with_scope: bool) -> tuple[str, ...]:
    default = "–" if field.default in (None, ()) else f"`{str(field.default).lower()}`"
    only = f" Only `{flag.commands[0]}`." if with_scope and len(flag.commands) == 1 else ""
    only += "" if flag.commands else " Only in a file."
    scope = (DECIDES[flag.scope],) if with_scope else ()
    return f"`{name.replace('_', '-')}`", _values(field, flag), default, *scope, flag.help + only


def _values(field: FieldInfo, flag: Setting) -> str:
    if get_origin(field.annotation) is tuple:
        return "list of texts"
    kinds = [kind for kind in get_args(field.annotation) if kind is not type(None)] or [field.annotation]
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(field.annotation))
    limits = flag.bounds | ({"le": MAX_INTEGER} if int in kinds and "le" not in flag.bounds else {})
    bounds = [f"{BOUNDS[key]} {_number(bound)}" for key, bound in limits.items()]
    choices = [f"`{choice}`" for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    words = {"int": "whole number", "float": "number", "str": "text", "bool": "`true`, `false`", "Path": "path"}
    word = " ".join([words[kinds[0].__name__ if isinstance(kinds[0], type) else "str"], ", ".join(bounds)]).strip()
    return ", ".join([word, *choices])


def _number(bound: float) -> str:
    return "2⁶³ − 1" if bound == MAX_SEED else f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    cells = [tuple(cell.replace("|", "\\|") for cell in row) for row in rows]
    if cells:
        names = tuple(header)
        yield "| " + " | ".join(names) + " |"
        yield "|" + "---|" * len(names)
        yield from ("| " + " | ".join(row) + " |" for row in cells)


def main() -> None:
    """See the module's text."""
    pages = {
        FOLDER / "cli.md": cli_page(), FOLDER / "configuration.md": configuration_page(), FLOWER_APP: flower_app(),
    }  # fmt: skip
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path} is out of date: run scripts/make_cli_reference.py", file=sys.stderr)
        sys.exit(1 if stale else 0)
    for path in stale:
        path.write_text(pages[path], encoding="utf-8")


if __name__ == "__main__":
    main()
