"""What a terminal gets, and what a pipe, a file and a service's journal get."""

import logging
import re
from pathlib import Path

import pytest

from fedshelf.tracking.terminal import LogHandler, continued, wrapped
from tests.unit.cli.screen import run, run_on_terminal
from tests.unit.data.samples import write_pack

TINY = ["--image-size", "16", "--width", "8", "--batch-size", "4", "--device", "cpu", "--rounds", "2"]
COLORS = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def simulate(home: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A short simulation, on a terminal of 80 columns if it is on one."""
    for name in ("lyon", "oslo"):
        write_pack(Path("stores") / name, {"apple": 5, "milk": 4})
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    return ["simulate", "--data-dir", "stores", "--run-dir", "r", *TINY]


EVENTS = [
    r"run \d{8}-\d{6}-\w{4}: 2 rounds, [\d,]+ parameters, 2 classes",
    r"lyon joined: 8 training photos, 1 validation photo \(1 of 2 stores needed to start\)",
    r"oslo joined: 8 training photos, 1 validation photo \(2 of 2 stores needed to start\)",
    r"round 1/2  2 of 2 stores  loss \d\.\d{3}  accuracy \d+\.\d %  \d+\.\d s.*",
    r"round 2/2  2 of 2 stores  loss \d\.\d{3}  accuracy \d+\.\d %  \d+\.\d s.*",
    r"run finished: 2 rounds done, best round \d",
]


@pytest.mark.parametrize("environment", [{}, {"COLUMNS": "40"}, {"FORCE_COLOR": "1"}])
def test_a_service_gets_one_plain_line_per_event(
    simulate: list[str], environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, text = run(*simulate)
    assert code == 0
    assert "\x1b" not in text
    assert "\r" not in text
    for line, event in zip(text.splitlines(), EVENTS, strict=False):
        assert re.fullmatch(event, line), line


def test_a_terminal_gets_a_bar_and_colors(simulate: list[str]) -> None:
    code, text = run_on_terminal(*simulate)
    assert code == 0
    assert COLORS.search(text)
    assert "2/2 rounds" in text
    assert "waiting for" in text


def test_no_color_is_honored(simulate: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    code, text = run_on_terminal(*simulate)
    assert code == 0
    assert "2/2 rounds" in text, "the bar is shown all the same"
    assert COLORS.findall(text) == []


def test_a_dumb_terminal_gets_neither_colors_nor_a_bar(simulate: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    code, text = run_on_terminal(*simulate)
    assert code == 0
    assert "\x1b" not in text
    assert "\r" not in text
    assert "2/2 rounds" not in text


def test_log_records_are_lines_with_their_level(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.Logger("service")
    log.addHandler(LogHandler())
    log.info("waiting for %d clients", 2)
    log.warning("skipping '%s' [bold]%s", "a\x1b[2Jb", "word " * 60)
    try:
        raise ValueError("x " * 100)
    except ValueError:
        log.exception("cannot answer")
    log.critical("the end\nof a product's name")
    lines = [line.rstrip() for line in capsys.readouterr().err.splitlines()]  # blanks at the end: depends on rich
    assert lines[0] == "waiting for 2 clients"
    assert lines[1] == r"warning: skipping 'a\x1b[2Jb' [bold]" + "word " * 59 + "word"
    assert lines[2:4] == ["error: cannot answer", "  Traceback (most recent call last):"]
    assert lines[-2:] == [f"  ValueError: {'x ' * 99}x", r"error: the end\x0aof a product's name"]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", [""]),
        ("one two three", ["one two", "three"]),
        ("12345678", ["12345678"]),
        ("123456789 b", ["123456789", "b"]),
        ("a --client-lr b", ["a", "--client-lr", "b"]),
        ("  a bcd efgh", ["  a bcd", "efgh"]),
        ("苹果 苹果 b", ["苹果", "苹果 b"]),
    ],
)
def test_lines_break_at_blanks_only(text: str, lines: list[str]) -> None:
    assert list(wrapped(text, 8)) == lines


@pytest.mark.parametrize(
    ("command", "lines"),
    [
        ("fedshelf demo", ["  fedshelf demo"]),
        ("fedshelf runs show RUN --root DIR", ["  fedshelf runs show RUN \\", "      --root DIR"]),
        ("fedshelf predict a-long-photo.jpg", ["  fedshelf predict \\", "      a-long-photo.jpg"]),
        ("a-command-without-any-blank-in-it", ["  a-command-without-any-blank-in-it"]),
    ],
)
def test_a_long_command_can_be_pasted(command: str, lines: list[str]) -> None:
    assert list(continued(command, 26, "  ")) == lines
