"""Text from outside: reversible names, and what may be shown on a terminal."""

import json
import os
import sqlite3
import tomllib
import unicodedata

import pytest
import tomli_w
from hypothesis import example, given
from hypothesis import strategies as st

from fedshelf.core.errors import DataError
from fedshelf.core.text import counted, from_filesystem, printable, some, to_filesystem

FILE_NAMES = st.binary(min_size=1).filter(lambda name: b"/" not in name and b"\0" not in name)


@given(FILE_NAMES)
@example("柠檬".encode("gbk"))
@example(b"caf\xe9")
@example(rb"caf\xe9")
@example(rb"\x5cxe9")
@example(b"\\\xe9\\x8\x84")
def test_a_name_of_any_bytes_becomes_text_that_leads_back_to_it(raw: bytes) -> None:
    name = os.fsdecode(raw)
    text = from_filesystem(name)
    assert os.fsencode(to_filesystem(text)) == raw
    assert json.loads(json.dumps(text, ensure_ascii=False).encode()) == text
    assert tomllib.loads(tomli_w.dumps({"name": text}).encode().decode())["name"] == text
    assert sqlite3.connect(":memory:").execute("SELECT ?", (text,)).fetchone() == (text,)


@given(st.lists(FILE_NAMES, unique=True, max_size=5))
@example([b"\xe9", rb"\xe9", rb"\x5cxe9"])
def test_different_names_stay_different(raw: list[bytes]) -> None:
    assert len({from_filesystem(os.fsdecode(name)) for name in raw}) == len(raw)


def test_ordinary_names_are_not_touched() -> None:
    for name in ("Milk [organic]", "柠檬", r"C:\new", "a b", "Purée", r"\x41", "50 %"):
        assert from_filesystem(name) == name


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Milk [organic] :apple:", "Milk [organic] :apple:"),
        ("\x1b[2J\r\n\tend\x7f", r"\x1b[2J\x0d\x0a\x09end\x7f"),
        ("\x9b31m", r"\u009b31m"),
        ("a\u202eb\u2066c\u200bd\ufeff", r"a\u202eb\u2066c\u200bd\ufeff"),
        ("line\u2028break", r"line\u2028break"),
        ("caf\udce9 \ud800", r"caf\xe9 \ud800"),
        ("\U000e0041", r"\U000e0041"),
        ("é 店 ಕ್ಷ می\u200cخواهم 👩\u200d🌾\u3000", "é 店 ಕ್ಷ می\u200cخواهم 👩\u200d🌾\u3000"),
    ],
)
def test_what_would_control_a_terminal_is_shown_as_an_escape(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown


@given(st.text(st.characters()))
def test_printable_text_holds_nothing_that_controls_and_can_be_encoded(text: str) -> None:
    shown = printable(text)
    shown.encode()
    assert not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in shown)


def test_an_error_can_be_shown_and_stored_whatever_name_is_in_it() -> None:
    error = DataError("photo 'caf\udce9\x1b[31m.jpg' is damaged")
    assert str(error) == r"photo 'caf\xe9\x1b[31m.jpg' is damaged"


def test_counts_and_names_read_like_english() -> None:
    assert [counted(n, "photo") for n in (0, 1, 1234)] == ["0 photos", "1 photo", "1,234 photos"]
    assert counted(2, "class", "classes") == "2 classes"
    assert some("abc") == "'a', 'b', 'c'"
    assert some("abcdefg") == "'a', 'b', 'c', 'd', 'e' and 2 more"
