"""Figures as SVG files in `plots/`: bar charts of ratios, and curves of accuracy over time."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.results import FEDSHELF, LIMIT, ONE_PROCESS, Figures

if TYPE_CHECKING:  # extra "bench"; slow to import, and only needed with --write
    from matplotlib.figure import Figure

FOLDER = Path(__file__).with_name("plots")
COLORS = {FEDSHELF: "#1a7f8e", LIMIT: "#8c959f", ONE_PROCESS: "#8c959f"}
PEER_COLOR = "#bc6c25"
WIDTH = 7.2  # inches


def draw_bars(section: str, figures: Mapping[str, Figures]) -> list[str]:
    """Draw a benchmark's bar charts, one for each size.

    Args:
        section: The section's name.
        figures: By program; a size follows the program's name after a comma.

    Returns:
        The Markdown that shows the charts.
    """
    images = []
    for size, names in itertools.groupby(figures, key=lambda name: name.partition(", ")[2]):
        ratios = {name.partition(", ")[0]: figures[name].ratio for name in names}
        title = f"{section}, {size}" if size else section
        text = "; ".join(f"{program} {_number(ratio)}" for program, ratio in ratios.items())
        chart = bar_chart(f"{title}: time relative to the limit (less is better)", ratios)
        images.append(_save(chart, title, f"{title}, times the limit: {text}"))
    return images


def bar_chart(title: str, ratios: Mapping[str, float]) -> "Figure":
    """Return a chart with a bar for each ratio, the smallest on top.

    Ratios that span more than a factor of ten get dots on a logarithmic scale, where a length is not an amount.
    """
    rows = sorted(ratios.items(), key=lambda row: row[1], reverse=True)
    names, values = [name for name, _ in rows], [value for _, value in rows]
    colors = [COLORS.get(name, PEER_COLOR) for name in names]
    figure = _figure(0.8 + 0.3 * len(rows))
    axes = figure.subplots()
    if values[0] > 10 * values[-1]:
        axes.scatter(values, names, c=colors, zorder=2)
        axes.set_xscale("log")
    else:
        axes.barh(names, values, color=colors, zorder=2)
    for name, value in rows:
        axes.annotate(_number(value), (value, name), (8, 0), textcoords="offset points", va="center")
    axes.set_title(title, fontsize=10)
    axes.margins(x=0.1)
    axes.grid(axis="x", alpha=0.3)
    return figure


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
    figure = _figure(3.6)
    axes = figure.subplots()
    for label, points in curves.items():
        axes.step([x for x, _ in points], [y for _, y in points], where="post", label=label)
    axes.set(title=title, xlabel=x_label, ylabel="accuracy %")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    return _save(figure, name, title)


def _figure(height: float) -> "Figure":
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "fedshelf", "svg.fonttype": "none", "font.size": 10})
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def _save(figure: "Figure", name: str, title: str) -> str:
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name.lower().replace(', ', '-').replace(' ', '-')}.svg"
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    return f"![{title}](plots/{path.name})"


def _number(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"
