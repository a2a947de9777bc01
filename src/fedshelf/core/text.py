"""Text from outside: names of files, messages from the network, words of other programs.

File names are bytes. `from_filesystem` makes text of them that JSON, TOML and SQLite can hold, distinct for distinct
names, and `to_filesystem` leads back. `printable` is for showing text of any origin to a person.
"""

import os
import re
import unicodedata
from collections.abc import Iterable

_NAMED = 5
_JOINERS = "\u200c\u200d"  # invisible, but Persian, Indic scripts and emoji need them
_CONTROL_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_BYTE = re.compile("[\udc80-\udcff]")  # how Python holds a byte of a name that is not UTF-8
_ESCAPE = re.compile(r"\\x([89a-f][0-9a-f]|5c)")
_LITERAL_ESCAPE = re.compile(r"\\(?=x(?:[89a-f][0-9a-f]|5c))")


def from_filesystem(name: str) -> str:
    r"""A file's name, or a path, as text: bytes that are not UTF-8 become `\xNN`, all else stays.

    A name that holds such an escape literally has its backslash written as `\x5c`, so that different names give
    different texts.

    Args:
        name: as `os` gives it.

    Returns:
        Text that UTF-8 can encode.
    """
    text = _LITERAL_ESCAPE.sub(r"\\x5c", os.fsencode(name).decode("utf-8", "surrogateescape"))
    return _BYTE.sub(lambda found: f"\\x{ord(found[0]) - 0xDC00:02x}", text)


def to_filesystem(text: str) -> str:
    """The name that `from_filesystem` made this text of, as `os` takes it."""
    raw = _ESCAPE.sub(lambda found: "\\" if found[1] == "5c" else chr(0xDC00 + int(found[1], 16)), text)
    return os.fsdecode(raw.encode("utf-8", "surrogateescape"))


def printable(text: str) -> str:
    r"""`text` on one line, harmless to a terminal: what would control it is shown as an escape such as `\x1b`.

    That goes for control characters, line breaks, marks that change the direction of writing, invisible characters
    (but those that join letters), and bytes that are no text.
    """
    return text if text.isprintable() else "".join(map(_shown, text))


def counted(number: int, noun: str, plural: str = "") -> str:
    """`1 photo`, `3 photos`; `plural` where it is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def some(names: Iterable[str]) -> str:
    """The first few names, each in quotation marks, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(f"'{name}'" for name in names[:_NAMED]) + more


def _shown(character: str) -> str:
    code = ord(character)
    if unicodedata.category(character) not in _CONTROL_CATEGORIES or character in _JOINERS:
        return character
    if code < 0x80 or _BYTE.fullmatch(character):
        return f"\\x{code & 0xFF:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
