"""*wire*: FedShelf, plain sockets and the peers in turn, at each size of the model."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import results
from benchmarks.measure import Program, Sample, median
from benchmarks.peers import registry
from benchmarks.results import FEDSHELF, LIMIT, Figures, Outcome
from benchmarks.samples import SampleLog, run_in_turn


@dataclass(frozen=True, kw_only=True)
class WireFigures(Figures):
    """Medians of a program that moves a model; `seconds` are those of a round, `peak_mb` is the server's.

    Attributes:
        all_peak_mb: Peak memory of all processes together.
        lo_ratio: Bytes on the loopback interface over the nominal bytes.
        anonymous_mb: The server's own memory at its peak; None for peers.
        above_idle: Of it, what the rounds added, in models; None for peers.
    """

    all_peak_mb: float
    lo_ratio: float
    anonymous_mb: float | None
    above_idle: float | None


def measure(
    log: SampleLog, *, runs: int, peers: bool, insecure: bool, clients: int, megabytes: Sequence[int], work: Path
) -> Outcome:  # fmt: skip
    """Run all programs and compare them; the summary is that of the largest size.

    Args:
        log: Where samples are kept.
        runs: Runs of each program.
        peers: Whether to measure other frameworks, too.
        insecure: Whether FedShelf does without TLS.
        clients: Client processes.
        megabytes: Sizes of the model.
        work: The folder for the peers' environments.

    Raises:
        MeasurementError: FedShelf or the limit failed.
    """
    samples: dict[int, Mapping[str, Sequence[Sample]]] = {}
    for size in megabytes:
        server = ("server", str(size), str(clients))
        programs = [
            Program(
                name=f"{FEDSHELF}, {size} MB",
                command=("benchmarks.wire_fedshelf", *server, "plain" if insecure else "tls"),
            ),
            Program(name=f"{LIMIT}, {size} MB", command=("benchmarks.wire_limit", *server)),
        ]
        if peers:
            programs += registry.wire_programs(size, work, log)
        samples[size] = run_in_turn(programs, runs, log)
    figures = {
        name: _figures(size, of, group[f"{LIMIT}, {size} MB"])
        for size, group in samples.items()
        for name, of in group.items()
    }
    largest = max(megabytes)
    return Outcome(
        text=_text(runs, figures, log.failures, peers=peers, insecure=insecure, clients=clients),
        figures=figures, failed=dict(log.failures),
        summary=figures[f"{FEDSHELF}, {largest} MB"].summary(figures[f"{LIMIT}, {largest} MB"]),
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


def _text(
    runs: int, figures: Mapping[str, WireFigures], failed: Mapping[str, str], *, peers: bool, insecure: bool,
    clients: int,
) -> str:  # fmt: skip
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
    parts = [
        f"{results.table(columns, rows)}\n\n{results.medians_of(runs)}, of 5 rounds with {clients} client "
        f"processes on loopback; FedShelf {'without' if insecure else 'with'} TLS, the limit (plain sockets) without."
    ]
    if peers:
        parts.append(
            f"Peers ({registry.versions(registry.DEPLOYMENTS)}): Flower and FLARE's simulator without TLS, FLARE's POC "
            "with TLS, which it always uses. A server of two processes counts with both. The result of every run was "
            "checked to the last bit."
        )
    return "\n\n".join([*parts, *results.failures(failed)])
