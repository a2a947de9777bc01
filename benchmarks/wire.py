"""*wire*: FedShelf, plain sockets and the peers in turn, at each size."""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks import results
from benchmarks.journal import Contender, Journal, alternate
from benchmarks.measure import Sample, median
from benchmarks.peers import contenders
from benchmarks.results import LIMIT, OURS, Figures, Outcome


@dataclass(frozen=True, kw_only=True)
class WireFigures(Figures):
    """`seconds` are those of a round, `peak_mb` is the server's.

    Of that, `anonymous_mb` is its own memory, and `above_idle` what the rounds added to it, in models. None for peers.
    """

    all_peak_mb: float
    lo_ratio: float
    anonymous_mb: float | None
    above_idle: float | None


def measure(arguments: argparse.Namespace, journal: Journal) -> Outcome:
    """Run everybody and compare; the contract's figures are those of the largest size.

    Raises:
        MeasurementError: FedShelf or the limit failed.
    """
    clients = ("--clients", str(arguments.clients))
    plain = ["--insecure"] if arguments.insecure else []
    samples: dict[int, Mapping[str, Sequence[Sample]]] = {}
    for megabytes in arguments.megabytes:
        size = f"{megabytes} MB"
        entrants = [
            Contender(name=f"{OURS}, {size}", command=("benchmarks.wire", str(megabytes), *clients, *plain)),
            Contender(name=f"{LIMIT}, {size}", command=("benchmarks.wire_limit", str(megabytes), *clients)),
        ]
        if arguments.peers:
            entrants += contenders.movers(megabytes, arguments.work, journal)
        samples[megabytes] = alternate(entrants, arguments.runs, journal)
    figures = {
        name: _figures(megabytes, of, group[f"{LIMIT}, {megabytes} MB"])
        for megabytes, group in samples.items()
        for name, of in group.items()
    }
    largest = max(arguments.megabytes)
    return Outcome(
        text=_text(arguments, figures, journal.failures), figures=figures, failed=dict(journal.failures),
        contract=figures[f"{OURS}, {largest} MB"].contract(figures[f"{LIMIT}, {largest} MB"]),
    )  # fmt: skip


def _figures(megabytes: int, of: Sequence[Sample], limit: Sequence[Sample]) -> WireFigures:
    seconds = median(of, results.round_seconds)
    anonymous = [(s.figures.get("server_idle_anonymous_mb"), s.figures.get("server_peak_anonymous_mb")) for s in of]
    known = [(idle, peak) for idle, peak in anonymous if idle is not None and peak is not None]
    return WireFigures(
        seconds=seconds, ratio=seconds / median(limit, results.round_seconds), round_seconds=seconds,
        cpu_seconds=median(of, lambda s: s.cpu_seconds), peak_mb=median(of, lambda s: s.figures["server_peak_mb"]),
        all_peak_mb=median(of, lambda s: s.peak_mb), lo_ratio=median(of, lambda s: s.figures["lo_ratio"] or 0.0),
        anonymous_mb=statistics.median(peak for _, peak in known) if known else None,
        above_idle=statistics.median(peak - idle for idle, peak in known) / megabytes if known else None,
    )  # fmt: skip


def _text(arguments: argparse.Namespace, figures: Mapping[str, WireFigures], failed: Mapping[str, str]) -> str:
    columns = [
        "", "s/round", "× limit", "CPU s", "server peak RSS MB", "of it anonymous", "above idle, in models",
        "all peak RSS MB", "lo bytes ÷ nominal",
    ]  # fmt: skip
    rows = [
        [
            name, f"{of.round_seconds:.3f}", f"{of.ratio:.1f}", f"{of.cpu_seconds:.1f}", f"{of.peak_mb:,.0f}",
            "–" if of.anonymous_mb is None else f"{of.anonymous_mb:,.0f}",
            "–" if of.above_idle is None else f"{of.above_idle:.1f}", f"{of.all_peak_mb:,.0f}", f"{of.lo_ratio:.3f}",
        ]
        for name, of in figures.items()
    ]  # fmt: skip
    security = "without" if arguments.insecure else "with"
    parts = [
        f"{results.table(columns, rows)}\n\nMedians of {arguments.runs} runs in turn, each of 5 rounds with "
        f"{arguments.clients} client processes on loopback; FedShelf {security} TLS, the limit without."
    ]
    if arguments.peers:
        parts.append(
            f"Peers ({contenders.versions(contenders.DEPLOYMENTS)}): Flower and FLARE's simulator without TLS, FLARE's "
            "POC with the TLS it always has. A server of two processes counts with both. The result of every run was "
            "checked to the last bit."
        )
    return "\n\n".join([*parts, *results.failures(failed)])
