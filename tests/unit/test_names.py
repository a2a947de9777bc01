"""Names are the field's: no module, class, function, method or flag is called by a word that only this project knew."""

import ast
from collections.abc import Iterator
from pathlib import Path

import typer.main

from fedshelf.cli.app import app

SOURCE = Path(__file__).resolve().parents[2] / "src" / "fedshelf"
BANNED = frozenset((
    "asking", "asker", "flight", "flights", "tally", "reception", "examination", "examine", "examiner",
    "checks", "orders", "central", "coding", "attempts", "room", "ahead", "workbench", "lane",
    "lanes", "gate", "door", "opening", "bodies", "take", "give", "agenda", "player",
    "turns", "exchange", "words", "worth", "ending", "settle", "reached", "answered", "hold",
    "equip", "keep", "speeds", "saying_what_to_do", "tell", "bells", "books", "ring", "complaint", "pays", "patiently",
    "die_first", "see_through", "let_go", "let_go_in_child", "left_as_it_was", "tried", "maker", "worth_making",
    "keep_busy", "most_of_upload", "stand_by", "take_again", "until_all_have", "without_places",
))  # fmt: skip
"""Wherever they name something."""
BANNED_MODULES = frozenset(["selection", "choice", "comparison", "memory", "line", "late", "ordered"])
"""Ordinary words that say nothing as the name of a module."""
BANNED_IN_PERSONALIZATION = frozenset(["finish"])


def names() -> Iterator[tuple[str, str]]:
    """Every module, class, function and method: (where, name)."""
    for path in sorted(SOURCE.rglob("*.py")):
        place = path.relative_to(SOURCE).as_posix()
        yield place, path.stem
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield place, node.name


def test_no_module_class_function_or_method_has_a_private_name() -> None:
    found = [f"{place}: {name}" for place, name in names() if name.strip("_").lower() in BANNED]
    assert found == []


def test_no_module_is_named_by_a_word_that_does_not_tell_what_it_holds() -> None:
    assert [place for place, name in names() if name == Path(place).stem and name in BANNED_MODULES] == []


def test_personalization_speaks_of_apply_update_state_and_finalize() -> None:
    found = [name for place, name in names() if place.startswith("personalization/")]
    assert not BANNED_IN_PERSONALIZATION & set(found)


def test_no_flag_has_a_private_name() -> None:
    group = typer.main.get_command(app)
    commands = [group]
    offered = set()
    while commands:
        command = commands.pop()
        commands += list(getattr(command, "commands", {}).values())
        for parameter in command.params:
            if not getattr(parameter, "hidden", False):
                offered |= {option.lstrip("-") for option in parameter.opts}
    assert "data-dir" in offered
    assert not BANNED & offered
