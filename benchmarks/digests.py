"""*digests*: digests of final models, of short runs and of the acceptance benchmark, with any version of FedShelf.

Two versions that train alike have equal digests on the same machine; the last bits of a model depend on the processor.
Only flags are used that every version since 1267943 has.
"""

import csv
import hashlib
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.numpy import load_file

from benchmarks import acceptance, photos
from benchmarks.fedshelf_cli import FedShelfCli
from benchmarks.measure import MeasurementError

ROUNDS, NUM_STORES = 4, 4
SHORT = (
    "--rounds", str(ROUNDS), "--local-epochs", "1", "--image-size", "32", "--val-fraction", "0.1", "--seed", "7",
    "--threads", "1",
)  # fmt: skip
CODECS = ("--codec-up", "topk:0.2+int8+zstd", "--codec-down", "int4+zstd")


def _simulate(cli: FedShelfCli, stores: Path, flags: Sequence[str]) -> None:
    cli.run("simulate", "--data-dir", str(stores), *flags)


def _resume(cli: FedShelfCli, stores: Path, flags: Sequence[str]) -> None:
    """Kill a simulation after half of its rounds, and run the same command again."""
    command = ("simulate", "--data-dir", str(stores), *flags)
    with cli.started(*command, "--json", stdout=subprocess.PIPE) as process:
        lines = (line for line in process.stdout or () if b'"round_finished"' in line)
        for _ in range(ROUNDS // 2):
            next(lines, None)
        process.kill()
        if process.wait() == 0:
            raise MeasurementError("the run to be resumed finished before it could be killed")
    cli.run(*command)


def _deploy(cli: FedShelfCli, stores: Path, flags: Sequence[str]) -> None:
    cli.deploy(sorted(stores.iterdir()), *flags)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run.

    Attributes:
        name: Its name in the table.
        flags: Flags in addition to those of all short runs.
        run: Runs it: over a folder of stores, with flags.
    """

    name: str
    flags: Sequence[str] = ()
    run: Callable[[FedShelfCli, Path, Sequence[str]], None] = _simulate


SCAFFOLD = ("--algorithm", "scaffold", "--scaffold-option", "1", *CODECS)
ACCEPTANCE = Case(name="acceptance, seed 0", flags=("--workers", "2"))
CASES = (
    Case(name="FedAvg"),
    Case(name="FedAvg, 2 workers", flags=("--workers", "2")),
    Case(name="FedAvg, resumed", run=_resume),
    Case(name="FedAvg, deployed", run=_deploy),
    Case(name="FedAvg, codecs", flags=CODECS),
    Case(name="FedProx", flags=("--algorithm", "fedprox", "--mu", "0.1")),
    Case(name="FedYogi", flags=("--algorithm", "fedyogi")),
    Case(name="FedBuff", flags=("--algorithm", "fedbuff", "--buffer-size", "2")),
    Case(name="SCAFFOLD, codecs", flags=SCAFFOLD),
    Case(name="SCAFFOLD, codecs, resumed", flags=SCAFFOLD, run=_resume),
    Case(name="SCAFFOLD, codecs, deployed", flags=SCAFFOLD, run=_deploy),
    Case(name="FedBN, codecs", flags=("--personalize", "fedbn", *CODECS)),
    Case(name="FedRep, sampling by size", flags=("--personalize", "fedrep", "--sampling", "size")),
    Case(
        name="Ditto, FedLC, median",
        flags=("--personalize", "ditto", "--loss", "fedlc", "--aggregator", "median", "--norm-bound", "1"),
    ),
    Case(name="fine-tuned", flags=("--personalize", "finetune", "--finetune-epochs", "1")),
    ACCEPTANCE,
)


def digests(source: Path, photos_folder: Path, work: Path, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Run cases, and yield the name and the digest of each.

    Args:
        source: The `src` folder of the version to run.
        photos_folder: The folder that holds the packs groceries-128 and groceries-small, and `splits/`.
        work: A new folder for unpacked photos, stores and runs.
        names: Names of the cases to run.

    Raises:
        PhotosMissingError: A pack is missing.
        MeasurementError: A run failed.
    """
    if not (source / "fedshelf" / "__init__.py").is_file():
        raise MeasurementError(f"'{source}' contains no package fedshelf: give the 'src' folder of a checkout")
    cli = FedShelfCli(home=work / "home", source=source)
    for case in CASES:
        if case.name not in names:
            continue
        if case is ACCEPTANCE:
            stores, flags = acceptance.partition(work, photos_folder, 0), acceptance.run_flags(work, photos_folder, 0)
        else:
            stores, flags = _short_run(photos_folder, work)
        run_dir = work / "runs" / case.name.replace(", ", "-").replace(" ", "-")
        case.run(cli, stores, (*flags, *case.flags, "--run-dir", str(run_dir)))
        yield case.name, model_digest(run_dir)


def model_digest(run_dir: Path) -> str:
    """Return the SHA-256 digest of a run's final models: their tensors, with names and shapes.

    Args:
        run_dir: The run's folder; the models of simulated stores count, too.

    Raises:
        MeasurementError: There is no model.
    """
    digest = hashlib.sha256()
    for folder in (run_dir / "model", *sorted((run_dir / "stores").glob("*"))):
        path = folder / "model.safetensors"
        if not path.is_file():
            raise MeasurementError(f"there is no model in '{folder}'")
        for name, values in sorted(load_file(path).items()):
            digest.update(f"{name} {values.dtype} {values.shape}\n".encode() + values.tobytes())
    return digest.hexdigest()


def _short_run(photos_folder: Path, work: Path) -> tuple[Path, list[str]]:
    """The stores of the short runs, and their flags: groceries-small, dealt in turn."""
    pack, stores = photos.unpack(photos_folder, work, photos.SMALL_PACK), work / "small-stores"
    if not stores.is_dir():
        assignment = work / "small-stores.csv"
        dealt = sorted(path.relative_to(pack) for path in (pack / "train").rglob("*.jpg"))
        with assignment.open("w", encoding="utf-8", newline="") as file:
            rows = ((path.as_posix(), f"store-{i % NUM_STORES + 1}") for i, path in enumerate(dealt))
            csv.writer(file).writerows([("photo", "store"), *rows])
        cli = FedShelfCli(home=work / "home")
        cli.run("data", "partition", str(pack), "--out", str(stores), "--assignment", str(assignment))
    return stores, [*SHORT, "--test-dir", str(pack / "test")]
