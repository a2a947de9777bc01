"""*pilot* and *chain*: FedShelf, the limit and the peers in turn, and whether all did the same work."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks import compare, photos, results
from benchmarks.journal import Contender, Journal, alternate
from benchmarks.measure import Sample, median
from benchmarks.peers import contenders
from benchmarks.results import LIMIT, ONE_PROCESS, OURS, Figures, Outcome
from benchmarks.workloads import Workload


@dataclass(frozen=True, kw_only=True)
class TrainingFigures(Figures):
    """`seconds` is wall clock. `whole` is false for who ran fewer rounds; `ratio` is then that of seconds per round."""

    processes: float
    first_step: float
    rounds: int
    whole: bool


def measure(workload: Workload, arguments: argparse.Namespace, journal: Journal) -> Outcome:
    """Run everybody and compare.

    Raises:
        DataError: there are no photos.
        MeasurementError: FedShelf or the limit failed.
        DifferentWorkError: FedShelf and the limit did not train alike.
    """
    folder = photos.prepare(workload, pack=arguments.photos, work=arguments.work)
    programs = {OURS: ("ours",), LIMIT: ("limits", "--processes", "2")}
    if arguments.one_process or arguments.peers:
        programs[ONE_PROCESS] = ("limits", "--processes", "1")
    entrants = [
        Contender(name=name, command=(f"benchmarks.{module}", workload.name, str(folder), *flags))
        for name, (module, *flags) in programs.items()
    ]
    if arguments.peers:
        entrants += contenders.trainers(workload, folder, arguments.work, journal, arguments.peer_rounds)
    samples = alternate(entrants, arguments.runs, journal)
    failed = dict(journal.failures)
    distance = max(compare.of_ours(*pair) for pair in zip(samples[OURS], samples[LIMIT], strict=True))
    distances = peers_distances(samples, failed)
    for name in failed:
        samples.pop(name, None)
    figures = {name: figures_of(workload, of, samples[LIMIT]) for name, of in samples.items()}
    return Outcome(
        text=_text(arguments, samples, figures, distance, distances, failed), figures=figures, failed=failed,
        contract=figures[OURS].contract(figures[LIMIT]),
    )  # fmt: skip


def peers_distances(
    samples: Mapping[str, Sequence[Sample]], failed: dict[str, str]
) -> dict[str, compare.Distance]:  # fmt: skip
    """By name; a peer that did other work is noted as failed."""
    distances = {}
    for name, of in samples.items():
        if name in (OURS, LIMIT, ONE_PROCESS):
            continue
        try:
            found = [compare.of_peer(peer, limit) for peer, limit in zip(of, samples[LIMIT], strict=True)]
            distances[name] = compare.Distance(first=max(d.first for d in found), all=max(d.all for d in found))
        except compare.DifferentWorkError as error:
            failed[name] = str(error)
    return distances


def figures_of(workload: Workload, of: Sequence[Sample], limit: Sequence[Sample]) -> TrainingFigures:
    """Medians. Who ran fewer rounds is compared by seconds per round instead of wall clock."""
    rounds = len(of[0].figures["train_loss"])
    seconds, round_seconds = median(of, lambda s: s.seconds), median(of, results.round_seconds)
    whole = rounds == workload.num_rounds
    ratio = (
        seconds / median(limit, lambda s: s.seconds) if whole else round_seconds / median(limit, results.round_seconds)
    )
    return TrainingFigures(
        seconds=seconds, ratio=ratio, round_seconds=round_seconds, cpu_seconds=median(of, lambda s: s.cpu_seconds),
        peak_mb=median(of, lambda s: s.peak_mb), processes=median(of, lambda s: s.processes),
        first_step=median(of, lambda s: s.first_step or 0.0), rounds=rounds, whole=whole,
    )  # fmt: skip


def _text(
    arguments: argparse.Namespace, samples: Mapping[str, Sequence[Sample]], figures: Mapping[str, TrainingFigures],
    distance: float, distances: Mapping[str, compare.Distance], failed: Mapping[str, str],
) -> str:  # fmt: skip
    columns = ["", "wall s", "× limit", "CPU s", "s/round", "first step at s", "peak RSS MB", "processes"]
    rows = [
        [
            name, f"{of.seconds:.2f}" if of.whole else f"{of.seconds:.0f} ({of.rounds} round{'s' * (of.rounds > 1)})",
            f"{of.ratio:.2f}" if of.whole else f"{of.ratio:.2f} per round", f"{of.cpu_seconds:.1f}",
            f"{of.round_seconds:.3f}", f"{of.first_step:.1f}", f"{of.peak_mb:,.0f}", f"{of.processes:.0f}",
        ]
        for name, of in figures.items()
    ]  # fmt: skip
    parts = [
        f"{results.table(columns, rows)}\n\nMedians of {arguments.runs} runs in turn; the limit is two processes of "
        f"one thread. Losses agree with the plain loop's to {distance:.0e} in every round."
    ]
    if distances:
        lines = [f"* {name}: {d.first:.0e} in the first round, {d.all:.0e} at most" for name, d in distances.items()]
        parts.append(
            f"Peers ({contenders.versions(contenders.SIMULATORS)}), each in an environment of its own with the same "
            "torch, and how far their training losses are from the plain loop's (they add up in float32 in orders of "
            "their own, and training amplifies that):\n\n" + "\n".join(lines)
        )
    return "\n\n".join([*parts, *results.failures(failed)])
