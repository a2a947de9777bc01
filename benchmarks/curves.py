"""Curves as SVG files in `plots/`: what accuracy is there after what time."""

from collections.abc import Mapping, Sequence
from pathlib import Path

FOLDER = Path(__file__).with_name("plots")


def draw(name: str, title: str, x_label: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Draw accuracies (%) over time, one curve for each name; the Markdown that shows the file.

    Args:
        name: of the file, without its ending.
        curves: points (time, accuracy) in the order of time; a value holds until the next one.
    """
    import matplotlib as mpl  # extra "bench"; slow to import, and only wanted with --write

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
