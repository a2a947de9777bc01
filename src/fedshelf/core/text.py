"""Text from outside: file names, messages from the network, output of other programs.

File names are bytes. `from_filesystem` converts them to text that JSON, TOML and SQLite can hold, without collisions,
and `to_filesystem` converts back. `printable` makes text of any origin safe to display.
"""

import difflib
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence

_NAMED = 5
_NEAR = 0.6  # least similarity of a name to suggest
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
_JOINERS = "\u200c\u200d"  # invisible, but Persian, Indic scripts and emoji need them
_CONTROL_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_BYTE = re.compile("[\udc80-\udcff]")  # how Python holds a byte of a name that is not UTF-8
_ESCAPE = re.compile(r"\\x([89a-f][0-9a-f]|5c)")
_LITERAL_ESCAPE = re.compile(r"\\(?=x(?:[89a-f][0-9a-f]|5c))")


def from_filesystem(name: str) -> str:
    r"""Convert a file name or path to text: bytes that are not UTF-8 become `\xNN`, the rest is unchanged.

    The backslash of a literal escape of this form is written as `\x5c`, so that different names give different
    texts.

    Args:
        name: as `os` returns it.

    Returns:
        Text that can be encoded as UTF-8.
    """
    text = _LITERAL_ESCAPE.sub(r"\\x5c", os.fsencode(name).decode("utf-8", "surrogateescape"))
    return _BYTE.sub(lambda found: f"\\x{ord(found[0]) - 0xDC00:02x}", text)


def to_filesystem(text: str) -> str:
    """Invert `from_filesystem`: the name as `os` expects it."""
    raw = _ESCAPE.sub(lambda found: "\\" if found[1] == "5c" else chr(0xDC00 + int(found[1], 16)), text)
    return os.fsdecode(raw.encode("utf-8", "surrogateescape"))


def printable(text: str) -> str:
    r"""Escape `text` for display on one line of a terminal, for example as `\x1b`.

    Escapes control characters, line breaks, bidirectional controls, invisible characters (except joiners), and
    undecodable bytes.
    """
    return text if text.isprintable() else "".join(map(_shown, text))


def spreadsheet_cell(text: str) -> str:
    """Text for a cell of a CSV file that no spreadsheet runs as a formula: `=1+1` becomes `'=1+1`.

    Source: OWASP, "CSV Injection".
    """
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun: `1 photo`, `3 photos`.

    Args:
        number: the count.
        noun: the singular.
        plural: the plural, if it is not the noun with an s.
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def some(names: Iterable[str]) -> str:
    """The first few names in quotation marks, and the number of the remaining ones."""
    return first_few(f"'{name}'" for name in names)


def first_few(items: Iterable[str]) -> str:
    """The first few items, escaped for display, and the number of the remaining ones."""
    items = list(items)
    more = f" and {len(items) - _NAMED} more" if len(items) > _NAMED else ""
    return ", ".join(map(printable, items[:_NAMED])) + more


def alternatives(names: Sequence[str]) -> str:
    """The names to choose from: `a`, `a or b`, `a, b, or c`."""
    *first, last = names
    return f"{', '.join(first)}{',' * (len(first) > 1)} or {last}" if first else last


def at_lines(lines: Sequence[int]) -> str:
    """Where a table has a problem: `lines 3, 4, 9, 12, 20 and 7 more`."""
    more = f" and {len(lines) - _NAMED:,} more" if len(lines) > _NAMED else ""
    return f"{'line' if len(lines) == 1 else 'lines'} {', '.join(f'{line:,}' for line in lines[:_NAMED])}{more}"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name closest to `word`, ignoring case; None if none is close."""
    by_folded = {name.casefold(): name for name in known}
    found = difflib.get_close_matches(word.casefold(), by_folded, n=1, cutoff=_NEAR)
    return by_folded[found[0]] if found else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A suffix for an error message, `: did you mean 'rounds'?`; empty if no known name is close to `word`."""
    near = nearest(word, known)
    return f": did you mean {near!r}?" if near else ""


def _shown(character: str) -> str:
    code = ord(character)
    if unicodedata.category(character) not in _CONTROL_CATEGORIES or character in _JOINERS:
        return character
    if code < 0x80 or _BYTE.fullmatch(character):
        return f"\\x{code & 0xFF:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
