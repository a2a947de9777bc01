"""Bar charts of ratios as small SVG files in `plots/`, written by hand: no plotting library, the same bytes each time.

Ratios that span more than a factor of ten get a logarithmic scale, where a dot on a line says that length is no amount.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from benchmarks.results import LIMIT, ONE_PROCESS, OURS, Figures

FOLDER = Path(__file__).with_name("plots")
WIDTH, ROW, TOP, LEFT, RIGHT = 720, 28, 56, 210, 70  # pixels; LEFT holds names, RIGHT values
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#24292f}.title{font-weight:600}.axis{fill:#6e7781;font-size:11px}"
    "line{stroke:#d0d7de}.ours{fill:#1a7f8e;stroke:#1a7f8e}.limit{fill:#8c959f;stroke:#8c959f}"
    ".peer{fill:#bc6c25;stroke:#bc6c25}@media(prefers-color-scheme:dark){text{fill:#e6edf3}.axis{fill:#8d96a0}"
    "line{stroke:#3d444d}}"
)


def draw(section: str, figures: Mapping[str, Figures]) -> list[str]:
    """Draw a benchmark's charts, one for each size; the Markdown that shows them.

    Args:
        section: name of the benchmark.
        figures: by contender; a size follows the name after a comma.
    """
    images = []
    sizes = itertools.groupby(figures, key=lambda name: name.partition(", ")[2])
    for size, names in sizes:
        ratios = {name.partition(", ")[0]: figures[name].ratio for name in names}
        title = f"{section}, {size}" if size else section
        name = f"{title.lower().replace(', ', '-').replace(' ', '-')}.svg"
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / name).write_text(chart(f"{title}: time over the limit's (less is better)", ratios), encoding="utf-8")
        text = "; ".join(f"{who} {_number(ratio)}" for who, ratio in ratios.items())
        images.append(f"![{title}, times the limit: {text}](plots/{name})")
    return images


def chart(title: str, ratios: Mapping[str, float]) -> str:
    """An SVG document with a row for each ratio, the smallest first."""
    rows = sorted(ratios.items(), key=lambda row: row[1])
    logarithmic = rows[-1][1] > 10 * rows[0][1]
    ticks = _decades(rows[0][1], rows[-1][1]) if logarithmic else _steps(rows[-1][1])
    height = TOP + ROW * len(rows) + 12
    bottom = height - 12

    def x(value: float) -> float:
        low, high = (math.log10(ticks[0]), math.log10(ticks[-1])) if logarithmic else (ticks[0], ticks[-1])
        place = math.log10(value) if logarithmic else value
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (place - low) / (high - low), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        f'<text class="title" x="8" y="20">{escape(title)}</text>',
    ]
    for tick in ticks:
        parts.append(f'<line x1="{x(tick)}" y1="{TOP - 8}" x2="{x(tick)}" y2="{bottom}"/>')
        parts.append(f'<text class="axis" x="{x(tick)}" y="{TOP - 14}" text-anchor="middle">{tick:g}×</text>')
    for row, (name, ratio) in enumerate(rows):
        parts += _row(name, ratio, TOP + ROW * row, x(ratio), dot=logarithmic)
    return "\n".join([*parts, "</svg>", ""])


def _row(name: str, ratio: float, top: int, end: float, *, dot: bool) -> list[str]:
    kind = {OURS: "ours", LIMIT: "limit", ONE_PROCESS: "limit"}.get(name, "peer")
    middle = top + ROW / 2
    length = round(end - LEFT, 1)
    shape = (
        f'<rect class="{kind}" x="{LEFT}" y="{middle - 1}" width="{length}" height="2"/>'
        f'<circle class="{kind}" cx="{end}" cy="{middle}" r="6"/>'
        if dot
        else f'<rect class="{kind}" x="{LEFT}" y="{top + 5}" width="{length}" height="{ROW - 10}"/>'
    )
    return [
        f'<text x="{LEFT - 10}" y="{middle + 4.5}" text-anchor="end">{escape(name)}</text>',
        shape,
        f'<text x="{end + 12}" y="{middle + 4.5}">{_number(ratio)}</text>',
    ]


def _number(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def _decades(low: float, high: float) -> Sequence[float]:
    """Powers of ten around all values."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [float(10**power) for power in range(first, max(last, first + 1) + 1)]


def _steps(high: float) -> Sequence[float]:
    """From zero, in steps of 1, 2 or 5 times a power of ten, to at least `high`."""
    power = 10 ** math.floor(math.log10(high / 4))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * 6 >= high)
    return [step * i for i in range(math.ceil(high / step - 1e-9) + 1)]
