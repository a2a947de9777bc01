"""`1 store`, `2 stores`: a number before a noun goes through one function, `core.text.counted`."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[2] / "src").rglob("*.py"))
NOUNS = (
    "stores clients photos rounds classes products runs files folders uploads parameters examples steps lines problems "
    "workers processes numbers copies messages members"
)
AFTER_A_NUMBER = re.compile(rf"^ (?:(?!of )[a-z]+ )?(?:{NOUNS.replace(' ', '|')})\b")
IN_A_LOG = re.compile(rf"%d (?:[a-z]+ )?(?:{NOUNS.replace(' ', '|')})\b")


def wrong_plurals(tree: ast.AST) -> Iterator[str]:
    """Texts whose noun stays plural after a 1."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            for number, text in zip(node.values, node.values[1:], strict=False):
                if isinstance(number, ast.FormattedValue) and isinstance(text, ast.Constant):
                    is_constant = isinstance(number.value, ast.Name) and number.value.id.isupper()
                    if AFTER_A_NUMBER.match(str(text.value)) and not is_constant:
                        yield ast.unparse(number.value) + str(text.value)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and IN_A_LOG.search(node.value):
            yield node.value


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_counted_noun_is_singular_after_one(source: Path) -> None:
    assert list(wrong_plurals(ast.parse(source.read_text(encoding="utf-8")))) == []


def test_the_check_sees_wrong_plurals() -> None:
    code = (
        'f"there are {len(names)} stores"\nlog.info("waiting for %d clients", n)\nf"{MOST} stores"\nf"{name} stores 3"'
    )
    assert len(list(wrong_plurals(ast.parse(code)))) == 3
