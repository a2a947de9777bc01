"""Help that fits the terminal, short for a first run and long on request."""

import re
from collections.abc import Iterator

import click
import pytest
import typer.main

from fedshelf.cli.app import app
from fedshelf.cli.options import BASIC
from tests.unit.cli.screen import cells, run, run_on_terminal

ROOT = typer.main.get_command(app)
Words = tuple[str, ...]


def commands(group: click.Command = ROOT, path: Words = ()) -> Iterator[tuple[Words, click.Command]]:
    """Every command with the words that call it."""
    yield path, group
    if isinstance(group, click.Group):
        for name, command in group.commands.items():
            yield from commands(command, (*path, name))


ALL = dict(commands())
FLAGS = {name for command in ALL.values() for p in command.params for name in (*p.opts, *p.secondary_opts)}
FLAGS |= {"--help", "--help-all"}


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z0-9-]+", text))


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_help_fits_the_terminal_and_cuts_no_flag(
    path: tuple[str, ...], columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    long = "--help-all" if path and path[0] in BASIC else "--help"
    for flag in {"--help", long}:
        code, text = run(*path, flag)
        assert code == 0
        assert [line for line in text.splitlines() if cells(line) > columns] == []
        assert flags_in(text) <= FLAGS, "a flag that does not exist is one that was cut"
    offered = {p.opts[0] for p in ALL[path].params if isinstance(p, click.Option) and not p.hidden}
    assert offered <= flags_in(text) if long == flag else True


@pytest.mark.parametrize("command", BASIC)
def test_help_shows_what_a_first_run_needs_and_help_all_everything(command: str) -> None:
    offered = {p.name: p.opts[0] for p in ALL[(command,)].params if not getattr(p, "hidden", False)}
    assert set(BASIC[command]) <= set(offered), "a basic flag that the command does not have"
    short, long = run(command, "--help")[1], run(command, "--help-all")[1]
    shown = flags_in(short.partition("Options:\n")[2].partition("\n\n")[0].replace("--no-", "--"))
    listed = {line.split()[0].rstrip(",") for line in short.splitlines() if line.startswith("  --")}
    assert {offered[name] for name in BASIC[command]} <= listed <= shown
    assert len(listed) <= 16
    assert set(offered.values()) <= flags_in(long)
    assert long.count(":\n  --") >= 3, "flags stand below their themes"


def test_every_command_is_one_line_of_the_list_on_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for path, command in ALL.items():
        if isinstance(command, click.Group):
            listed = run(*path, "--help")[1].partition("Commands:\n")[2].partition("\n\n")[0].splitlines()
            assert [line.split()[0] for line in listed] == list(command.commands)


def test_the_first_help_names_an_example_and_the_documentation() -> None:
    text = run("--help")[1]
    assert "Example: fedshelf demo" in text
    assert "Documentation: docs/index.md" in text
    assert "$FEDSHELF_HOME" in text


def test_help_is_plain_on_a_terminal_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run_on_terminal("server", "--help") == run("server", "--help")


def test_a_long_example_can_be_copied() -> None:
    text = run("client", "--help")[1]
    example = text.partition("Example: ")[2].replace("\\\n", " ").split()
    assert example[:2] == ["fedshelf", "client"]
    assert flags_in(" ".join(example)) == {"--data-dir", "--server-address", "--token"}


def test_no_command_at_all_shows_the_help() -> None:
    code, text = run()
    assert code == 2
    assert text == run("--help")[1]
