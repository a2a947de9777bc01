"""Formats numbers and text for the user. Missing values are shown as a dash."""

from collections.abc import Sequence

from fedshelf.core.text import counted

ABSENT = "–"
_BARS = "▁▂▃▄▅▆▇█"


def percent(fraction: float | None) -> str:
    """Format a fraction in [0, 1] as `61.3 %`."""
    return ABSENT if fraction is None else f"{100 * fraction:.1f} %"


def number(value: float | None, digits: int = 3) -> str:
    """Format a number as `1.234`."""
    return ABSENT if value is None else f"{value:.{digits}f}"


def size(num_bytes: float | None) -> str:
    """Format a size as `5.3 MB`."""
    if num_bytes is None:
        return ABSENT
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def duration(seconds: float | None, digits: int = 1) -> str:
    """Format a duration as `4.2 s`, `12 min 5 s` or `3 h 20 min`; `digits` is the number of decimals of the first."""
    if seconds is None:
        return ABSENT
    if seconds < 59.95:
        return f"{seconds:.{digits}f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def caveats(num_classes: int | None, num_test: int | None, num_test_left_out: int) -> list[str]:
    """Explain why a run's accuracies may be less meaningful than they seem.

    Args:
        num_classes: number of products in the model.
        num_test: number of test photos at the server.
        num_test_left_out: number of further test photos, of products that no client has.

    Returns:
        One sentence per caveat.
    """
    found = []
    if num_classes == 1:
        found.append(
            "there is one product in all stores: any model names each photo right, and no accuracy says anything"
        )
    if num_test_left_out:
        total = counted((num_test or 0) + num_test_left_out, "test photo")
        found.append(f"the central accuracy is of {num_test:,} of {total}: no store has the products of the others")
    return found


def sparkline(values: Sequence[float | None], width: int = 24) -> str:
    """Draw a series as `▁▃▅▇█`, from its minimum to its maximum; missing values are spaces.

    A longer series is thinned evenly to `width`; its last value is always included.
    """
    if len(values) > width:
        last = len(values) - 1
        values = [values[round(i * last / (width - 1))] for i in range(width)]
    present = [value for value in values if value is not None]
    if not present:
        return ""
    low, span = min(present), (max(present) - min(present)) or 1.0
    return "".join(" " if v is None else _BARS[round((v - low) / span * (len(_BARS) - 1))] for v in values)
