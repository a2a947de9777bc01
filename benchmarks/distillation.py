"""*distillation*: a light student that learns from a pretrained teacher, in the stores, at the server, and together.

    teacher      EfficientNet-Lite0 with ImageNet weights, fine-tuned over the stores
    alone        the student over the stores, from random weights, without a teacher
    federated    the same training, with the teacher in the loss (`fedshelf distill`)
    ensemble     the same, and the stores' models of each round distilled at the server (FedDF)
    alone, central; central    the same two from all photos at the server

A student trains as many steps with a teacher as without one.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import acceptance, photos, results
from benchmarks.fedshelf_cli import FedShelfCli
from fedshelf.tracking.queries import run_summary

TEACHER = (
    "--model", "tf_efficientnet_lite0", "--pretrained", "--image-size", "96", "--rounds", "6", "--local-epochs", "1",
)  # fmt: skip
STUDENT = ("--image-size", "48", "--local-epochs", "2")
WAYS = ("alone", "federated", "ensemble", "alone, central", "central")


def measure(
    work: Path, photos_folder: Path, seeds: Sequence[int], *, rounds: int, flags: Sequence[str] = (),
    ways: Sequence[str] = WAYS,
) -> str:  # fmt: skip
    """Run all ways, and return the section of RESULTS.md; interrupted runs resume.

    Args:
        work: The folder for unpacked photos, stores and runs.
        photos_folder: The folder that holds the groceries-128 pack and `splits/`.
        seeds: Seeds of splits and training.
        rounds: Rounds of the students.
        flags: More flags of the students that have a teacher.
        ways: What to run, of `WAYS`.
    """
    work = work.absolute()
    found = {seed: _accuracies(work, photos_folder, seed, rounds, flags, ways) for seed in seeds}
    return report(found, rounds=rounds, flags=flags)


def report(found: Mapping[int, Mapping[str, float]], *, rounds: int, flags: Sequence[str] = ()) -> str:
    """One row per model: accuracies by seed, gain over the same student alone, and share of the gap closed."""
    names, rows = list(next(iter(found.values()))), []
    for name in names:
        values = [of[name] for of in found.values()]
        base = "alone, central" if name == "central" else "alone"
        gains = [of[name] - of[base] for of in found.values()]
        closed = [gain / (of["teacher"] - of[base]) for gain, of in zip(gains, found.values(), strict=True)]
        is_taught = name in ("federated", "ensemble", "central")
        rows.append([
            name, f"{statistics.fmean(values):.1%}", " / ".join(f"{value:.1%}" for value in values),
            " / ".join(f"{100 * gain:+.1f}" for gain in gains) if is_taught else "",
            f"{statistics.fmean(closed):.0%}" if is_taught else "", str(len(values)),
        ])  # fmt: skip
    columns = ["", "accuracy", "of each seed", "points over the same alone", "of the gap to the teacher", "seeds"]
    return (
        f"{results.table(columns, rows)}\n\n81 products, 8 stores (Dirichlet 0.3), accuracy on the official test "
        f"photos of all products. Teacher: EfficientNet-Lite0 at 96 px, ImageNet weights, fine-tuned over the stores "
        f"in 6 rounds. Student: resnet10 (318 k parameters) at 48 px from random weights, {rounds} rounds of 2 epochs"
        f"{', with ' + ' '.join(flags) if flags else ''}. Unlabelled photos of the ensemble: the official validation "
        "photos."
    )


def _accuracies(
    work: Path, photos_folder: Path, seed: int, rounds: int, flags: Sequence[str], ways: Sequence[str]
) -> dict[str, float]:
    cli, stores = FedShelfCli(home=work / "home"), acceptance.partition(work, photos_folder, seed)
    pack = photos.unpack(photos_folder, work)
    place, common = work / f"distillation-{seed}", ("--test-dir", str(pack / "test"), "--seed", str(seed))
    teacher = place / "teacher"
    cli.run("simulate", "--data-dir", str(stores), *common, *TEACHER, "--run-dir", str(teacher))
    student = (*common, *STUDENT, "--rounds", str(rounds), "--test-every", str(rounds), "--teacher", str(teacher))
    catalogue = ("--catalogue", str(teacher / "catalogue.json"))
    central, plain = ("--mode", "central", "--data-dir", str(pack / "train")), ("--distill-weight", "0")
    commands = {
        "alone": ("--data-dir", str(stores), *plain),
        "federated": ("--data-dir", str(stores), *flags),
        "ensemble": (
            "--data-dir", str(stores), *flags, "--mode", "ensemble", "--unlabelled-dir", str(pack / "val"),
        ),
        "alone, central": (*central, *plain),
        "central": (*central, *flags),
    }  # fmt: skip
    found = {"teacher": _accuracy(teacher)}
    for way in ways:
        run = place / way.replace(", ", "-")
        cli.run("distill", *student, *catalogue, *commands[way], "--run-dir", str(run))
        found[way] = _accuracy(run)
    return found


def _accuracy(run: Path) -> float:
    return run_summary(run).rounds[-1].central_accuracy or 0.0
