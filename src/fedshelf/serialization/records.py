"""Events as JSON, as stored in the database and printed by `--json`."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from fedshelf.core.events import Event
from fedshelf.core.text import printable


def kind(event: Event) -> str:
    """The name of an event's kind, such as `round_finished` for a RoundFinished."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()


def to_json(event: Event, *, ascii: bool = False) -> str:
    """An event as one line: `{"event": "round_finished", "round": 3, ...}`. NaN and infinity become null."""
    return dump({"event": kind(event), **dataclasses.asdict(event)}, ascii=ascii)


def dump(value: Any, *, indent: int | None = None, ascii: bool = False) -> str:
    """Serialize plain values as strict JSON; NaN and infinity become null.

    Args:
        value: the value.
        indent: indentation; None writes one line.
        ascii: escape all other characters, for terminals that lack them.

    Returns:
        The text. Characters that control a terminal or reorder text are escaped in any case.
    """
    text = json.dumps(_strict(value), ensure_ascii=ascii, allow_nan=False, indent=indent)
    return "".join(map(_escaped, text)) if not text.isascii() or "\x7f" in text else text


def finite(value: float | None) -> float | None:
    """`value`, or None if it is NaN or infinite."""
    return value if value is not None and math.isfinite(value) else None


def _escaped(character: str) -> str:
    if character == "\n" or printable(character) == character:  # a line break in JSON is its layout
        return character
    return json.dumps(character)[1:-1] if character != "\x7f" else "\\u007f"


def _strict(value: Any) -> Any:
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value
