"""*bytes*: how many bytes each codec takes to reach an accuracy, and how much accuracy it costs."""

import statistics
from collections.abc import Sequence

from benchmarks import results
from benchmarks.studies import study
from benchmarks.studies.study import Experiment, Result, Study

TARGET = 0.37
PLAIN = "none, none"
RECOMMENDED = "drive, int4+zstd"
CODECS = (
    PLAIN,
    "fp16, fp16",
    "int8+zstd, int8+zstd",
    "int4+zstd, int4+zstd",
    "topk:0.1+int8+zstd, int4+zstd",
    "topk:0.05+int8+zstd, int4+zstd",
    "topk:0.05+int4+zstd, int4+zstd",
    "topk:0.01+int8+zstd, int4+zstd",
    "randk:0.1+int8+zstd, int4+zstd",
    RECOMMENDED,
    "drive, drive",
)
"""Up and down; the first is what all others are compared with."""


def _experiment(codecs: str) -> Experiment:
    up, down = codecs.split(", ")
    return Experiment(name=codecs, flags=("--codec-up", up, "--codec-down", down))


def report(found: Sequence[Result]) -> str:
    """One row per pair of codecs: means over seeds, and the ratios to 32-bit floats on the same seeds."""
    grouped = study.by_name(found)
    plain = {result.seed: result for result in grouped.get(PLAIN, ())}
    columns = [
        "up, down", "accuracy %", "points below fp32", "MB up", "× fewer", "MB down", "× fewer",
        f"MB up to {TARGET:.0%}",
    ]  # fmt: skip
    rows = []
    for codecs, of in grouped.items():
        base = [plain[result.seed] for result in of if result.seed in plain]
        reached = [(result, result.round_reaching(TARGET)) for result in of]
        to_target = [result.bytes_up[number - 1] for result, number in reached if number is not None]
        rows.append(
            [
                ", ".join(f"`{codec}`" for codec in codecs.split(", ")),
                study.percent([result.final_accuracy for result in of]),
                f"{100 * (_mean_accuracy(base) - _mean_accuracy(of)):+.1f}" if len(base) == len(of) else "–",
                *_megabytes([result.bytes_up[-1] for result in of], [result.bytes_up[-1] for result in base]),
                *_megabytes([_bytes_down(result) for result in of], [_bytes_down(result) for result in base]),
                f"{statistics.fmean(to_target) / 1e6:.1f}" if len(to_target) == len(of) else "missed",
            ]
        )  # fmt: skip
    seeds = ", ".join(map(str, sorted({result.seed for result in found})))
    return (
        f"{results.table(columns, rows)}\n\nThe acceptance benchmark (81 products, 8 stores, 30 rounds), mean and "
        f"standard deviation over seeds {seeds}; payload bytes of all clients and rounds, the first download of the "
        "whole model included."
    )


def summary(found: Sequence[Result]) -> dict[str, float]:
    """Megabytes both ways of the recommended codecs and of 32-bit floats, in the form of the other benchmarks."""
    grouped = study.by_name(found)
    ours, limit = (
        statistics.fmean(result.num_bytes[-1] for result in of) / 1e6 if (of := grouped.get(codecs)) else float("nan")
        for codecs in (RECOMMENDED, PLAIN)
    )
    return {"ours": ours, "limit": limit, "ratio": ours / limit, "peak_mb": 0.0}


def _mean_accuracy(found: Sequence[Result]) -> float:
    return statistics.fmean(result.final_accuracy for result in found)


def _bytes_down(result: Result) -> int:
    return result.num_bytes[-1] - result.bytes_up[-1]


def _megabytes(of: Sequence[int], base: Sequence[int]) -> tuple[str, str]:
    """The mean in megabytes, and how many times fewer that is."""
    return f"{statistics.fmean(of) / 1e6:.1f}", f"{sum(base) / sum(of):.1f}" if len(base) == len(of) else "–"


STUDY = Study(
    name="bytes", help="Compare how many bytes each codec takes to reach an accuracy.",
    experiments=tuple(map(_experiment, CODECS)), report=report, summary=summary,
)  # fmt: skip
