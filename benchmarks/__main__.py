"""`python -m benchmarks pilot|chain|wire|bytes`: FedShelf, the limit and the peers in turn, and how they compare."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import platformdirs

from benchmarks import plots, results, training, transport
from benchmarks.compare import DifferentWorkError
from benchmarks.journal import Journal, code_digest
from benchmarks.measure import MeasurementError
from benchmarks.results import Outcome
from benchmarks.wire_limit import NUM_CLIENTS, power_of_two
from benchmarks.workloads import WORKLOADS
from fedshelf.core.errors import DataError, FedShelfError

WIRE_SIZES = (10, 100)  # megabytes


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure FedShelf against the limit of this machine and against its peers, all in turn. "
        "An interrupted measurement goes on where it was.",
        epilog="example: python -m benchmarks pilot --runs 5 --peers --write",
    )
    parser.add_argument("benchmark", choices=[*WORKLOADS, "wire", "bytes"])
    parser.add_argument("--runs", type=int, default=5, help="runs of each side (default: 5)")
    parser.add_argument("--json", action="store_true", help="print seconds, ratio and peak memory as JSON")
    parser.add_argument("--write", action="store_true", help="write benchmarks/RESULTS.md, its plots and results.json")
    parser.add_argument("--peers", action="store_true", help="measure other frameworks, too (makes their environments)")
    parser.add_argument("--peer-rounds", type=int, metavar="N", help="pilot, chain: at most N rounds of each peer")
    parser.add_argument("--fresh", action="store_true", help="begin anew instead of going on where it was")
    parser.add_argument("--photos", type=Path, help="where the groceries pack is (default: beside the project)")
    parser.add_argument(
        "--work", type=Path, default=Path(platformdirs.user_cache_dir("fedshelf", appauthor=False)) / "benchmarks",
        help="folder for prepared photos, samples and the peers' environments (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--one-process", action="store_true", help="measure the plain loop in one process, too")
    parser.add_argument("--insecure", action="store_true", help="wire: without TLS")
    parser.add_argument(
        "--clients", type=power_of_two, default=NUM_CLIENTS, help="wire: client processes (default: %(default)s)"
    )
    parser.add_argument("--megabytes", type=int, nargs="+", default=WIRE_SIZES, metavar="N", help="wire: sizes")
    parsed = parser.parse_args(arguments)
    if min(parsed.runs, parsed.peer_rounds or 1, *parsed.megabytes) < 1:
        parser.error("--runs, --peer-rounds and --megabytes must be at least 1")
    if parsed.peers and parsed.clients != NUM_CLIENTS:
        parser.error(f"--peers measures {NUM_CLIENTS} clients")
    return parsed


def measure(arguments: argparse.Namespace) -> Outcome:
    """Run the benchmark, or go on with it."""
    name, arguments.work = arguments.benchmark, arguments.work.absolute()
    if name == "bytes":
        return _bytes(arguments)
    path = arguments.work / "samples" / f"{section(arguments)}-{code_digest()}.jsonl"
    with Journal(path, fresh=arguments.fresh) as journal:
        if len(journal):
            print(f"{name}: going on with {len(journal)} runs in {path}", file=sys.stderr)
        if name == "wire":
            outcome = transport.measure(arguments, journal)
        else:
            outcome = training.measure(WORKLOADS[name], arguments, journal)
        journal.finish()
    return outcome


def _bytes(arguments: argparse.Namespace) -> Outcome:
    """All codecs, three seeds; `python -m benchmarks.bytes` has flags for fewer."""
    from benchmarks import acceptance
    from benchmarks import bytes as bytes_to_accuracy

    settings = argparse.Namespace(
        seed=None, up=None, down="none", workers=2, photos=arguments.photos or acceptance.PHOTOS,
        work=arguments.work / "bytes",
    )  # fmt: skip
    contract, text = bytes_to_accuracy.measure(settings)
    return Outcome(contract=contract, text=text)


def section(arguments: argparse.Namespace) -> str:
    """The name of the section, which tells apart what must not be mixed."""
    details = ["without TLS"] * arguments.insecure
    details += [f"{arguments.clients} clients"] * (arguments.clients != NUM_CLIENTS)
    return ", ".join([arguments.benchmark, *details])


def command(arguments: argparse.Namespace) -> str:
    """What to type for the same measurement."""
    flags = [f"--{flag}" for flag in ("insecure", "one-process", "peers") if getattr(arguments, flag.replace("-", "_"))]
    if arguments.peer_rounds:
        flags += ["--peer-rounds", str(arguments.peer_rounds)]
    if arguments.clients != NUM_CLIENTS:
        flags += ["--clients", str(arguments.clients)]
    if tuple(arguments.megabytes) != WIRE_SIZES:
        flags += ["--megabytes", *map(str, arguments.megabytes)]
    return " ".join(["python -m benchmarks", arguments.benchmark, "--runs", str(arguments.runs), *flags])


def main() -> int:
    """The exit code: 0 measured, 1 failed, 2 wrong usage, 77 no photos, 130 interrupted."""
    arguments = parse()
    name = arguments.benchmark
    try:
        outcome = measure(arguments)
    except DataError as error:
        print(f"{name}: skipped: {error}", file=sys.stderr)
        return 77
    except (FedShelfError, MeasurementError, DifferentWorkError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command goes on where it was", file=sys.stderr)
        return 130
    print(json.dumps(outcome.contract) if arguments.json else outcome.text)
    if arguments.write:
        title = section(arguments)
        images = plots.draw(title, outcome.figures)
        results.write(title, "\n\n".join([outcome.text, *images]), command(arguments))
        results.record(title, outcome)
    return 0


if __name__ == "__main__":
    sys.exit(main())
