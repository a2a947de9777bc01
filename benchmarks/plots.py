"""Figures as SVG files in `plots/`: bar charts of ratios, and curves.

Bar charts are written without a plotting library. Ratios that span more than a factor of ten get a logarithmic scale
and dots in place of bars, since a length on such a scale is not an amount.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from benchmarks.results import FEDSHELF, LIMIT, ONE_PROCESS, Figures

FOLDER = Path(__file__).with_name("plots")
WIDTH, ROW, TOP, LEFT, RIGHT = 720, 28, 56, 210, 70  # pixels; LEFT holds names, RIGHT values
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#24292f}.title{font-weight:600}.axis{fill:#6e7781;font-size:11px}"
    "line{stroke:#d0d7de}.fedshelf{fill:#1a7f8e;stroke:#1a7f8e}.limit{fill:#8c959f;stroke:#8c959f}"
    ".peer{fill:#bc6c25;stroke:#bc6c25}@media(prefers-color-scheme:dark){text{fill:#e6edf3}.axis{fill:#8d96a0}"
    "line{stroke:#3d444d}}"
)


def draw_bars(section: str, figures: Mapping[str, Figures]) -> list[str]:
    """Draw a benchmark's bar charts, one for each size.

    Args:
        section: The section's name.
        figures: By program; a size follows the program's name after a comma.

    Returns:
        The Markdown that shows the charts.
    """
    images = []
    sizes = itertools.groupby(figures, key=lambda name: name.partition(", ")[2])
    for size, names in sizes:
        ratios = {name.partition(", ")[0]: figures[name].ratio for name in names}
        title = f"{section}, {size}" if size else section
        name = f"{title.lower().replace(', ', '-').replace(' ', '-')}.svg"
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / name).write_text(
            chart(f"{title}: time relative to the limit (less is better)", ratios), encoding="utf-8"
        )
        text = "; ".join(f"{program} {_number(ratio)}" for program, ratio in ratios.items())
        images.append(f"![{title}, times the limit: {text}](plots/{name})")
    return images


def draw_curves(name: str, title: str, x_label: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Draw accuracies (%) over time, one curve for each name.

    Args:
        name: The file's name, without its ending.
        title: The figure's title.
        x_label: What the time is.
        curves: Points (time, accuracy), sorted by time; a value holds until the next one.

    Returns:
        The Markdown that shows the figure.
    """
    import matplotlib as mpl  # extra "bench"; slow to import, and only needed with --write

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "fedshelf", "svg.fonttype": "none", "font.size": 10})
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for label, points in curves.items():
        axes.step([x for x, _ in points], [y for _, y in points], where="post", label=label)
    axes.set(title=title, xlabel=x_label, ylabel="accuracy %")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    return f"![{title}](plots/{path.name})"


def chart(title: str, ratios: Mapping[str, float]) -> str:
    """Return an SVG document with a row for each ratio, the smallest first."""
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
    kind = {FEDSHELF: "fedshelf", LIMIT: "limit", ONE_PROCESS: "limit"}.get(name, "peer")
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
