"""The documentation says what the code says."""

import dataclasses
import re
import runpy
from pathlib import Path
from typing import Any, get_args

import pytest

from fedshelf.core import errors, events, messages
from fedshelf.core.encoded import Encoded

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LEAVES = DOCS / "explanation" / "what-leaves-a-store.md"
MESSAGES = (*get_args(messages.ClientMessage), *get_args(messages.ServerMessage))
PARTS = (
    messages.TaskKey, messages.ClassFolder, messages.CandidateScore, messages.ProductCount, messages.ModelDelta,
    Encoded,
)  # fmt: skip


def section(page: Path, title: str) -> str:
    """The text between the heading `title` and the next heading."""
    parts = re.split(r"^#+ +(.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[title]


def first_cells(table: str) -> list[str]:
    """What stands between backticks at the beginning of each row."""
    return re.findall(r"^\| `([^`]+)`", table, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("page", "maker"),
    [
        ("docs/reference/cli.md", "cli_page"), ("docs/reference/configuration.md", "configuration_page"),
        ("flower/pyproject.toml", "flower_app"),
    ],
)  # fmt: skip
def test_the_reference_of_flags_and_keys_is_what_the_commands_offer(page: str, maker: str) -> None:
    script: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "make_cli_reference.py"))
    written = (ROOT / page).read_text(encoding="utf-8")
    assert written == script[maker](), "run scripts/make_cli_reference.py"


@pytest.mark.parametrize("kind", [*MESSAGES, *PARTS], ids=lambda kind: kind.__name__)
def test_every_field_of_every_message_is_in_the_table_of_what_leaves_a_store(kind: type[Any]) -> None:
    told = first_cells(section(LEAVES, kind.__name__))
    assert told == [field.name for field in dataclasses.fields(kind)]


def test_every_error_is_in_the_reference_of_errors() -> None:
    named = {name for name, found in vars(errors).items() if isinstance(found, type)}
    assert set(first_cells(section(DOCS / "reference" / "errors.md", "Kinds of errors"))) == named


def test_every_status_of_a_client_is_explained() -> None:
    told = first_cells(section(DOCS / "explanation" / "a-round.md", "How a store ends a round"))
    assert told == [status.value for status in events.ClientStatus]


@pytest.mark.parametrize(
    "page",
    [ROOT / name for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md", "CHANGELOG.md")],
    ids=lambda page: page.name,
)
def test_links_into_the_documentation_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"[(`](docs/[a-z0-9/.-]+(?:CN\.md)?)", page.read_text(encoding="utf-8"))
    assert targets
    assert [target for target in targets if not (page.parent / target).exists()] == []
