"""*bytes to accuracy*: how many bytes each codec needs on the acceptance benchmark, and what it costs in accuracy.

    python -m benchmarks.bytes                        # all codecs, three seeds; takes hours, goes on where it was
    python -m benchmarks.bytes --seed 0 --up drive+zstd --down int4+zstd

Every run is kept below --work, with one record; one that was interrupted goes on. Bytes are those of the payloads
(the wire adds less than 2 %, see *wire*), of all clients and rounds, the first download of the whole model included.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import acceptance, results
from fedshelf.tracking.queries import run_summary

TARGET = 0.37
PLAIN = ("none", "none")
CODECS: Sequence[tuple[str, str]] = (
    PLAIN,
    ("fp16", "fp16"),
    ("int8+zstd", "int8+zstd"),
    ("int4+zstd", "int4+zstd"),
    ("topk:0.1+int8+zstd", "int4+zstd"),
    ("topk:0.05+int8+zstd", "int4+zstd"),
    ("topk:0.05+int4+zstd", "int4+zstd"),
    ("topk:0.01+int8+zstd", "int4+zstd"),
    ("randk:0.1+int8+zstd", "int4+zstd"),
    ("drive", "int4+zstd"),
    ("drive", "drive"),
)
"""Up and down; the first is what all others are compared with."""
RECOMMENDED = ("drive", "int4+zstd")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run. `up` and `down` in bytes; `up_to_target`: bytes sent until the target accuracy (None: missed)."""

    codec_up: str
    codec_down: str
    seed: int
    accuracy: float
    up: int
    down: int
    up_to_target: int | None


def run(work: Path, photos: Path, codec_up: str, codec_down: str, seed: int, workers: int) -> Record:
    """Simulate one run, or read what it came to."""
    name = f"{codec_up}-{codec_down}-{seed}".replace(":", "_")
    path = work / f"{name}.json"
    if not path.exists():
        run_dir = acceptance.simulate(
            work, photos, seed, work / name, ["--codec-up", codec_up, "--codec-down", codec_down], workers=workers
        )  # fmt: skip
        rounds = run_summary(run_dir).rounds
        reached = next((i for i, each in enumerate(rounds, 1) if (each.central_accuracy or 0.0) >= TARGET), None)
        record = Record(
            codec_up=codec_up, codec_down=codec_down, seed=seed, accuracy=rounds[-1].central_accuracy or 0.0,
            up=sum(each.bytes_up for each in rounds), down=sum(each.bytes_down for each in rounds),
            up_to_target=None if reached is None else sum(each.bytes_up for each in rounds[:reached]),
        )  # fmt: skip
        path.write_text(json.dumps(asdict(record)), encoding="utf-8")
    return Record(**json.loads(path.read_text(encoding="utf-8")))


def table(records: Sequence[Record]) -> str:
    """One row per pair of codecs: mean over seeds, and the ratios to fp32 of the same seeds."""
    plain = {record.seed: record for record in records if (record.codec_up, record.codec_down) == PLAIN}
    columns = [
        "up, down", "accuracy %", "points below fp32", "MB up", "× fewer", "MB down", "× fewer",
        f"MB up to {TARGET:.0%}",
    ]  # fmt: skip
    rows = []
    for pair in dict.fromkeys((record.codec_up, record.codec_down) for record in records):
        of = [record for record in records if (record.codec_up, record.codec_down) == pair]
        base = [plain[record.seed] for record in of if record.seed in plain]
        below = statistics.fmean(r.accuracy for r in base) - statistics.fmean(r.accuracy for r in of) if base else 0.0
        to_target = [record.up_to_target for record in of if record.up_to_target is not None]
        rows.append(
            [
                f"`{pair[0]}`, `{pair[1]}`", results.spread([100 * record.accuracy for record in of]),
                f"{100 * below:+.1f}",
                f"{statistics.fmean(r.up for r in of) / 1e6:.1f}", _fewer([r.up for r in base], [r.up for r in of]),
                f"{statistics.fmean(r.down for r in of) / 1e6:.1f}",
                _fewer([r.down for r in base], [r.down for r in of]),
                f"{statistics.fmean(to_target) / 1e6:.1f}" if len(to_target) == len(of) else "missed",
            ]
        )  # fmt: skip
    return results.table(columns, rows)


def contract(records: Sequence[Record]) -> dict[str, float]:
    """Megabytes both ways of the recommended codecs against fp32: the benchmark's figures for programs."""
    means = {}
    for name, pair in (("ours", RECOMMENDED), ("limit", PLAIN)):
        of = [record.up + record.down for record in records if (record.codec_up, record.codec_down) == pair]
        means[name] = statistics.fmean(of) / 1e6 if of else float("nan")
    return {**means, "ratio": means["ours"] / means["limit"], "peak_mb": 0.0}


def measure(arguments: argparse.Namespace) -> tuple[dict[str, float], str]:
    """The figures for programs, and the text for a person."""
    pairs = [(arguments.up, arguments.down)] if arguments.up else list(CODECS)
    records = [
        run(arguments.work, arguments.photos, up, down, seed, arguments.workers)
        for seed in arguments.seed or [0, 1, 2]
        for up, down in dict.fromkeys([PLAIN, *pairs])
    ]
    seeds = sorted({record.seed for record in records})
    text = (
        f"{table(records)}\n\nThe acceptance benchmark (81 products, 8 stores, 30 rounds), mean and standard deviation "
        f"over seeds {', '.join(map(str, seeds))}; payload bytes of all clients and rounds."
    )
    return contract(records), text


def _fewer(base: Sequence[int], of: Sequence[int]) -> str:
    return f"{sum(base) / sum(of):.1f}" if base and len(base) == len(of) else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, action="append", help="split and training (default: 0, 1 and 2)")
    parser.add_argument("--up", help="only this --codec-up (and fp32)")
    parser.add_argument("--down", default="none", help="with --up: --codec-down")
    parser.add_argument("--workers", type=int, default=2, help="worker processes")
    parser.add_argument("--photos", type=Path, default=acceptance.PHOTOS, help="folder with groceries-128.tar.gz")
    parser.add_argument("--work", type=Path, default=Path("runs") / "bytes", help="where photos and runs go")
    parser.add_argument("--write", action="store_true", help="write the section into benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    figures, text = measure(arguments)
    print(text)
    print(json.dumps(figures), file=sys.stderr)
    if arguments.write:
        chosen = f" --up {arguments.up} --down {arguments.down}" if arguments.up else ""
        seeds = "".join(f" --seed {seed}" for seed in arguments.seed or ())
        results.write("bytes", text, f"python -m benchmarks.bytes{chosen}{seeds}")


if __name__ == "__main__":
    main()
