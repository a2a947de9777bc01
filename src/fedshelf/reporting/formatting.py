"""Figures and other people's words as text for a person. What is absent is a dash."""

import re
from collections.abc import Sequence

ABSENT = "–"
_BARS = "▁▂▃▄▅▆▇█"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def percent(fraction: float | None) -> str:
    """A fraction in [0, 1] as `61.3 %`."""
    return ABSENT if fraction is None else f"{100 * fraction:.1f} %"


def number(value: float | None, digits: int = 3) -> str:
    """`1.234`."""
    return ABSENT if value is None else f"{value:.{digits}f}"


def size(num_bytes: float | None) -> str:
    """`5.3 MB`."""
    if num_bytes is None:
        return ABSENT
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def duration(seconds: float | None) -> str:
    """`4.2 s`, `12 min 5 s`, `3 h 20 min`."""
    if seconds is None:
        return ABSENT
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def printable(text: str) -> str:
    """A text from the network, safe to print: nothing in it can move the cursor or turn the line around."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def sparkline(values: Sequence[float | None], width: int = 24) -> str:
    """How a figure went, as `▁▃▅▇█`, from its least to its greatest value; a blank where it is absent.

    A longer series is thinned out evenly; its last value always shows.
    """
    if len(values) > width:
        last = len(values) - 1
        values = [values[round(i * last / (width - 1))] for i in range(width)]
    present = [value for value in values if value is not None]
    if not present:
        return ""
    low, span = min(present), (max(present) - min(present)) or 1.0
    return "".join(" " if v is None else _BARS[round((v - low) / span * (len(_BARS) - 1))] for v in values)
