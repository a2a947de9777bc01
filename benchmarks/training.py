"""*pilot* and *chain*: FedShelf, the limit and the peers in turn, and whether all of them did the same work.

Losses tell whether two programs did the same work; accuracy alone does not. Training amplifies rounding errors: peers
that sum in float32, in another order or on two threads, agree with the plain loop in the first round and differ by some
1e-3 from the second round on. A peer that trains on other photos, from other weights, at another rate or without
averaging differs by 1e-2 or more in the first rounds already.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import photos, results
from benchmarks.measure import Program, Sample, median
from benchmarks.peers import registry
from benchmarks.results import FEDSHELF, LIMIT, ONE_PROCESS, Figures, Outcome
from benchmarks.samples import SampleLog, run_in_turn
from benchmarks.workloads import Workload
from fedshelf.core.errors import FedShelfError

TOLERANCE = 1e-4  # nats, between losses of the same round
PEER_TOLERANCE = 0.02  # nats, a peer's losses after the first round


class DifferentWorkError(FedShelfError):
    """Two programs did not do the same work, so their times cannot be compared."""


@dataclass(frozen=True, kw_only=True)
class TrainingFigures(Figures):
    """Medians of a program that trains; `seconds` is wall clock.

    Attributes:
        processes: The highest number of processes at a time.
        first_step: Seconds until training first enters the network.
        rounds: Rounds that were run.
        is_complete: Whether these are all rounds of the workload; if not, `ratio` is that of seconds per round.
    """

    processes: float
    first_step: float
    rounds: int
    is_complete: bool


@dataclass(frozen=True, kw_only=True)
class LossDifference:
    """The largest differences in training loss (nats).

    Attributes:
        first: In the first round.
        all: In all rounds.
    """

    first: float
    all: float


def measure(
    workload: Workload, log: SampleLog, *, runs: int, peers: bool, peer_rounds: int | None, one_process: bool,
    photos_folder: Path, work: Path,
) -> Outcome:  # fmt: skip
    """Run all programs and compare them.

    Args:
        workload: What to train.
        log: Where samples are kept.
        runs: Runs of each program.
        peers: Whether to measure other frameworks, too.
        peer_rounds: The most rounds of each peer.
        one_process: Whether to measure the plain loop in one process, too; peers imply it.
        photos_folder: The folder that holds the groceries-128 pack.
        work: The folder for prepared photos and the peers' environments.

    Raises:
        DataError: There are no photos.
        MeasurementError: FedShelf or the limit failed.
        DifferentWorkError: FedShelf and the limit did not do the same work.
    """
    folder = photos.prepare(workload, photos=photos_folder, work=work)
    commands = {FEDSHELF: ("training_fedshelf",), LIMIT: ("training_limit", "2")}
    if one_process or peers:
        commands[ONE_PROCESS] = ("training_limit", "1")
    programs = [
        Program(name=name, command=(f"benchmarks.{module}", workload.name, str(folder), *processes))
        for name, (module, *processes) in commands.items()
    ]
    if peers:
        programs += registry.simulation_programs(workload, folder, work, log, peer_rounds)
    samples = run_in_turn(programs, runs, log)
    failed = dict(log.failures)
    difference = max(loss_difference(*pair) for pair in zip(samples[FEDSHELF], samples[LIMIT], strict=True))
    differences = peer_loss_differences(samples, failed)
    figures = {name: figures_of(workload, of, samples[LIMIT]) for name, of in samples.items() if name not in failed}
    return Outcome(
        text=_text(runs, figures, difference, differences, failed), figures=figures, failed=failed,
        summary=figures[FEDSHELF].summary(figures[LIMIT]),
    )  # fmt: skip


def loss_difference(fedshelf: Sample, limit: Sample) -> float:
    """Return the largest difference between the training losses of FedShelf and the plain loop in a round.

    Raises:
        DifferentWorkError: It exceeds the tolerance, or accuracies or the numbers of rounds differ.
    """
    differences = {}
    for name in ("train_loss", "test_accuracy"):
        pair: tuple[Sequence[float], Sequence[float]] = (fedshelf.figures.get(name, []), limit.figures.get(name, []))
        if len(pair[0]) != len(pair[1]):
            raise DifferentWorkError(f"{name}: FedShelf reports {len(pair[0])} rounds, the plain loop {len(pair[1])}")
        differences[name] = max((abs(a - b) for a, b in zip(*pair, strict=True)), default=0.0)
    if max(differences.values()) > TOLERANCE:
        raise DifferentWorkError(
            f"FedShelf and the plain loop differ by up to {differences['train_loss']:.2g} in training loss and by "
            f"{differences['test_accuracy']:.2g} in test accuracy ({TOLERANCE:g} is allowed): they did not do the same "
            "work"
        )
    return differences["train_loss"]


def peer_loss_difference(peer: Sample, limit: Sample) -> LossDifference:
    """Return how far a peer's training losses are from the plain loop's, over the rounds that it ran.

    Raises:
        DifferentWorkError: They are further apart than rounding explains.
    """
    losses = peer.figures["train_loss"]
    expected = limit.figures["train_loss"][: len(losses)]
    if not losses or len(losses) != len(expected):
        raise DifferentWorkError(f"it reports {len(losses)} rounds, the plain loop {len(expected)}")
    differences = [abs(a - b) for a, b in zip(losses, expected, strict=True)]
    found = LossDifference(first=differences[0], all=max(differences))
    if found.first > TOLERANCE or found.all > PEER_TOLERANCE:
        raise DifferentWorkError(
            f"its training losses differ by {found.first:.2g} in the first round ({TOLERANCE:g} is allowed) and by up "
            f"to {found.all:.2g} in all rounds ({PEER_TOLERANCE:g}): it did not do the same work"
        )
    return found


def peer_loss_differences(samples: Mapping[str, Sequence[Sample]], failed: dict[str, str]) -> dict[str, LossDifference]:
    """Return the differences by peer; peers that did other work are added to `failed`."""
    differences = {}
    for name, of in samples.items():
        if name in (FEDSHELF, LIMIT, ONE_PROCESS):
            continue
        try:
            found = [peer_loss_difference(peer, limit) for peer, limit in zip(of, samples[LIMIT], strict=True)]
            differences[name] = LossDifference(first=max(d.first for d in found), all=max(d.all for d in found))
        except DifferentWorkError as error:
            failed[name] = str(error)
    return differences


def figures_of(workload: Workload, of: Sequence[Sample], limit: Sequence[Sample]) -> TrainingFigures:
    """Return a program's medians. One that ran fewer rounds is compared by seconds per round."""
    rounds = len(of[0].figures["train_loss"])
    seconds, round_seconds = median(of, lambda s: s.seconds), median(of, results.round_seconds)
    is_complete = rounds == workload.num_rounds
    ratio = (
        seconds / median(limit, lambda s: s.seconds)
        if is_complete
        else round_seconds / median(limit, results.round_seconds)
    )
    return TrainingFigures(
        seconds=seconds, ratio=ratio, round_seconds=round_seconds, cpu_seconds=median(of, lambda s: s.cpu_seconds),
        peak_mb=median(of, lambda s: s.peak_mb), processes=median(of, lambda s: s.processes),
        first_step=median(of, lambda s: s.first_step or 0.0), rounds=rounds, is_complete=is_complete,
    )  # fmt: skip


def _text(
    runs: int, figures: Mapping[str, TrainingFigures], difference: float,
    differences: Mapping[str, LossDifference], failed: Mapping[str, str],
) -> str:  # fmt: skip
    columns = ["", "wall s", "× limit", "CPU s", "s/round", "first step at s", "peak RSS MB", "processes"]
    rows = [
        [
            name,
            f"{of.seconds:.2f}" if of.is_complete else f"{of.seconds:.0f} ({of.rounds} round{'s' * (of.rounds > 1)})",
            f"{of.ratio:.2f}" if of.is_complete else f"{of.ratio:.2f} per round", f"{of.cpu_seconds:.1f}",
            f"{of.round_seconds:.3f}", f"{of.first_step:.1f}", f"{of.peak_mb:,.0f}", f"{of.processes:.0f}",
        ]
        for name, of in figures.items()
    ]  # fmt: skip
    parts = [
        f"{results.table(columns, rows)}\n\n{results.medians_of(runs)}; the limit is a plain PyTorch loop in two "
        f"processes of one thread. Losses agree with the plain loop's to {difference:.0e} in every round."
    ]
    if differences:
        lines = [f"* {name}: {d.first:.0e} in the first round, {d.all:.0e} at most" for name, d in differences.items()]
        parts.append(
            f"Peers ({registry.versions(registry.SIMULATORS)}), each in its own environment with the same torch, and "
            "how far their training losses are from the plain loop's (they sum in float32 in their own order, and "
            "training amplifies rounding errors):\n\n" + "\n".join(lines)
        )
    return "\n\n".join([*parts, *results.failures(failed)])
