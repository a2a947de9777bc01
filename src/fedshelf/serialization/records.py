"""Events as JSON: what the database keeps of each, and what `--json` prints."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from fedshelf.core.events import Event


def kind(event: Event) -> str:
    """`round_finished` for a RoundFinished."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()


def to_json(event: Event, *, ascii: bool = False) -> str:
    """One line: `{"event": "round_finished", "round": 3, ...}`. NaN and infinity are written as null."""
    return dump({"event": kind(event), **dataclasses.asdict(event)}, ascii=ascii)


def dump(value: Any, *, indent: int | None = None, ascii: bool = False) -> str:
    """Strict JSON of plain values: what JSON has no number for becomes null.

    Args:
        value: to be written.
        indent: of lines; None writes one line.
        ascii: escape all other characters, for a terminal that may lack them, or that some of them control.
    """
    return json.dumps(_strict(value), ensure_ascii=ascii, allow_nan=False, indent=indent)


def finite(value: float | None) -> float | None:
    """None for what is no number."""
    return value if value is not None and math.isfinite(value) else None


def _strict(value: Any) -> Any:
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value
