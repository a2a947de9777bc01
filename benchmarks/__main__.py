"""`python -m benchmarks pilot|chain|wire`: FedShelf and the limit in turn, and how they compare."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import platformdirs

from benchmarks import photos, results
from benchmarks.measure import MeasurementError, Sample, alternate, median
from benchmarks.wire_limit import NUM_CLIENTS, power_of_two
from benchmarks.workloads import WORKLOADS, Workload
from fedshelf.core.errors import DataError, FedShelfError

OURS, LIMIT, ONE_PROCESS = "FedShelf", "limit", "one process"
TOLERANCE = 1e-4  # nats, between losses of the same round
WIRE_SIZES = (10, 100)  # megabytes


class DifferentWorkError(Exception):
    """The two sides did not do the same work: their times mean nothing."""


def train(workload: Workload, arguments: argparse.Namespace) -> tuple[dict[str, float], str]:
    """Measure *pilot* or *chain*: the contract's figures, and the text for a person."""
    folder = str(photos.prepare(workload, pack=arguments.photos, work=arguments.work))
    commands = {
        OURS: ["benchmarks.ours", workload.name, folder],
        LIMIT: ["benchmarks.limits", workload.name, folder, "--processes", "2"],
    }
    if arguments.one_process:
        commands[ONE_PROCESS] = ["benchmarks.limits", workload.name, folder, "--processes", "1"]
    samples = alternate(commands, arguments.runs)
    distance = max(_distance(ours, limit) for ours, limit in zip(samples[OURS], samples[LIMIT], strict=True))
    reference = median(samples[LIMIT], lambda s: s.seconds)
    text = (
        f"{_training_table(samples)}\n\nMedians of {arguments.runs} runs in turn; the limit is two processes of "
        f"one thread. Losses agree with the plain loop's to {distance:.0e} in every round."
    )
    ours = median(samples[OURS], lambda s: s.seconds)
    return _contract(ours, reference, median(samples[OURS], lambda s: s.peak_mb)), text


def _training_table(samples: Mapping[str, Sequence[Sample]]) -> str:
    reference = median(samples[LIMIT], lambda s: s.seconds)
    columns = ["", "wall s", "× limit", "CPU s", "s/round", "first step at s", "peak RSS MB", "processes"]
    rows = [
        [
            name,
            f"{median(of, lambda s: s.seconds):.2f}",
            f"{median(of, lambda s: s.seconds) / reference:.2f}",
            f"{median(of, lambda s: s.cpu_seconds):.1f}",
            f"{median(of, _round_seconds):.3f}",
            f"{median(of, lambda s: s.first_step or 0.0):.1f}",
            f"{median(of, lambda s: s.peak_mb):,.0f}",
            f"{median(of, lambda s: s.processes):.0f}",
        ]
        for name, of in samples.items()
    ]
    return results.table(columns, rows)


def wire(arguments: argparse.Namespace) -> tuple[dict[str, float], str]:
    """Measure *wire* at each size; the contract's figures are those of the largest."""
    plain = ["--insecure"] if arguments.insecure else []
    clients = ["--clients", str(arguments.clients)]
    columns = [
        "", "s/round", "× limit", "CPU s", "server peak RSS MB", "of it anonymous", "above idle, in models",
        "all peak RSS MB", "lo bytes ÷ nominal",
    ]  # fmt: skip
    rows, contract = [], {}
    for size in WIRE_SIZES:
        commands = {
            OURS: ["benchmarks.wire", str(size), *clients, *plain],
            LIMIT: ["benchmarks.wire_limit", str(size), *clients],
        }
        samples = alternate(commands, arguments.runs)
        reference = median(samples[LIMIT], _round_seconds)
        rows += [
            [
                f"{name}, {size} MB",
                f"{median(of, _round_seconds):.3f}",
                f"{median(of, _round_seconds) / reference:.1f}",
                f"{median(of, lambda s: s.cpu_seconds):.1f}",
                f"{median(of, lambda s: s.figures['server_peak_mb']):,.0f}",
                f"{median(of, lambda s: s.figures['server_peak_anonymous_mb'] or 0.0):,.0f}",
                f"{median(of, _anonymous_above_idle) / size:.1f}",
                f"{median(of, lambda s: s.peak_mb):,.0f}",
                f"{median(of, lambda s: s.figures['lo_ratio'] or 0.0):.3f}",
            ]
            for name, of in samples.items()
        ]
        contract = _contract(
            median(samples[OURS], _round_seconds), reference,
            median(samples[OURS], lambda s: s.figures["server_peak_mb"]),
        )  # fmt: skip
    text = (
        f"{results.table(columns, rows)}\n\nMedians of {arguments.runs} runs in turn, each of 5 rounds with "
        f"{arguments.clients} client "
        f"processes on loopback; FedShelf {'without' if arguments.insecure else 'with'} TLS, the limit without."
    )
    return contract, text


def _anonymous_above_idle(sample: Sample) -> float:
    """MB of anonymous memory that the rounds cost the server at most."""
    figures = sample.figures
    return (figures["server_peak_anonymous_mb"] or 0.0) - (figures["server_idle_anonymous_mb"] or 0.0)


def _round_seconds(sample: Sample) -> float:
    times: Sequence[float] = sorted(sample.figures["round_seconds"])
    return times[len(times) // 2]


def _distance(ours: Sample, limit: Sample) -> float:
    """The largest difference between the two sides' losses of a round.

    Raises:
        DifferentWorkError: it is above the tolerance, or the accuracies or the numbers of rounds differ.
    """
    differences = {}
    for name in ("train_loss", "test_accuracy"):
        pair: tuple[Sequence[float], Sequence[float]] = (ours.figures.get(name, []), limit.figures.get(name, []))
        if len(pair[0]) != len(pair[1]):
            raise DifferentWorkError(f"{name}: FedShelf reports {len(pair[0])} rounds, the plain loop {len(pair[1])}")
        differences[name] = max((abs(a - b) for a, b in zip(*pair, strict=True)), default=0.0)
    if max(differences.values()) > TOLERANCE:
        raise DifferentWorkError(
            f"FedShelf and the plain loop disagree by up to {differences['train_loss']:.2g} in training loss and "
            f"{differences['test_accuracy']:.2g} in test accuracy ({TOLERANCE:g} is allowed): they did not train alike"
        )
    return differences["train_loss"]


def _contract(ours: float, limit: float, peak_mb: float) -> dict[str, float]:
    return {
        "ours": round(ours, 4),
        "limit": round(limit, 4),
        "ratio": round(ours / limit, 3),
        "peak_mb": round(peak_mb),
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure FedShelf against the limit of this machine, both in turn.",
        epilog="example: python -m benchmarks pilot --runs 5 --write",
    )
    parser.add_argument("benchmark", choices=[*WORKLOADS, "wire"])
    parser.add_argument("--runs", type=int, default=5, help="runs of each side (default: 5)")
    parser.add_argument("--json", action="store_true", help="print seconds, ratio and peak memory as JSON")
    parser.add_argument("--write", action="store_true", help="write the section into benchmarks/RESULTS.md")
    parser.add_argument("--photos", type=Path, help="where the groceries pack is (default: beside the project)")
    parser.add_argument(
        "--work", type=Path, default=Path(platformdirs.user_cache_dir("fedshelf", appauthor=False)) / "benchmarks",
        help="folder for prepared photos (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--one-process", action="store_true", help="measure the plain loop in one process, too")
    parser.add_argument("--insecure", action="store_true", help="wire: without TLS")
    parser.add_argument(
        "--clients", type=power_of_two, default=NUM_CLIENTS, help="wire: client processes (default: %(default)s)"
    )
    parsed = parser.parse_args(arguments)
    if parsed.runs < 1:
        parser.error("--runs must be at least 1")
    return parsed


def main() -> int:
    """The exit code: 0 measured, 1 failed, 2 wrong usage, 77 skipped because the photos are missing."""
    arguments = parse()
    name = arguments.benchmark
    try:
        contract, text = wire(arguments) if name == "wire" else train(WORKLOADS[name], arguments)
    except DataError as error:
        print(f"{name}: skipped: {error}", file=sys.stderr)
        return 77
    except (FedShelfError, MeasurementError, DifferentWorkError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(contract) if arguments.json else text)
    if arguments.write:
        section = ", ".join(
            [name, *["without TLS"] * arguments.insecure]
            + [f"{arguments.clients} clients"] * (arguments.clients != NUM_CLIENTS)
        )
        flags = [flag for flag in ("--insecure", "--one-process") if getattr(arguments, flag[2:].replace("-", "_"))]
        flags += ["--clients", str(arguments.clients)] if arguments.clients != NUM_CLIENTS else []
        results.write(section, text, " ".join(["python -m benchmarks", name, "--runs", str(arguments.runs), *flags]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
