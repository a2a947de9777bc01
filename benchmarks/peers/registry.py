"""Who else is measured, in which environment, and with how many rounds."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.journal import ROOT, Contender, Journal
from benchmarks.peers import environments, prepare
from benchmarks.workloads import Workload

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A framework's program.

    Attributes:
        name: as in tables.
        environment: name of its file in `requirements/`.
        command: module and first arguments; the job's folder or the megabytes follow.
        most_rounds: fewer rounds than the workload has, by workload, where all would take too long.
        patience: seconds for one run.
    """

    name: str
    environment: str
    command: Sequence[str]
    most_rounds: Mapping[str, int] = field(default_factory=dict)
    patience: float = 1200.0

    def version(self) -> str:
        """The packages that its requirements name first, such as `flwr 1.41.0`."""
        lines = (environments.REQUIREMENTS / f"{self.environment}.txt").read_text(encoding="utf-8").splitlines()
        pinned = next(line for line in lines if "==" in line)
        return pinned.partition("[")[0].partition("==")[0] + " " + pinned.partition("==")[2]


SIMULATORS = (
    Peer(
        name="Flower simulation", environment="flower-simulation", command=("benchmarks.peers.flower_simulation",),
    ),
    Peer(
        name="NVIDIA FLARE simulator", environment="nvflare", command=("benchmarks.peers.nvflare_simulation",),
        most_rounds={"chain": 1},
    ),
    Peer(name="pfl-research", environment="pfl", command=(*TORCHRUN, "benchmarks.peers.pfl_simulation")),
)  # fmt: skip
DEPLOYMENTS = (
    Peer(name="Flower SuperLink", environment="flower-deployment", command=("benchmarks.peers.flower_wire",)),
    Peer(
        name="Flower legacy gRPC", environment="flower-deployment", command=("benchmarks.peers.flower_legacy_wire",),
    ),
    Peer(name="NVIDIA FLARE simulator", environment="nvflare", command=("benchmarks.peers.nvflare_wire", "simulator")),
    Peer(name="NVIDIA FLARE POC", environment="nvflare", command=("benchmarks.peers.nvflare_wire", "poc")),
)  # fmt: skip


def trainers(
    workload: Workload, photos: Path, work: Path, journal: Journal, rounds: int | None = None
) -> list[Contender]:
    """The simulators, ready to run `workload` (at most `rounds` rounds of it); those that cannot are noted as failed.

    Args:
        workload: what to do.
        photos: the folder of its photos.
        work: where environments, jobs and logs are kept.
        journal: where a failure is noted.
        rounds: fewer rounds than the workload has.
    """
    found = []
    for peer in SIMULATORS:
        count = min(workload.num_rounds, peer.most_rounds.get(workload.name, sys.maxsize), rounds or sys.maxsize)
        folder = work / "jobs" / f"{workload.name}-{count}"
        folder.mkdir(parents=True, exist_ok=True)
        prepare.export(replace(workload, num_rounds=count), photos, folder)
        found += _ready(peer, peer.name, str(folder.absolute()), work, journal)
    return found


def movers(megabytes: int, work: Path, journal: Journal) -> list[Contender]:
    """The deployments, ready to move a model; those that cannot are noted as failed."""
    return [
        contender
        for peer in DEPLOYMENTS
        for contender in _ready(peer, f"{peer.name}, {megabytes} MB", str(megabytes), work, journal)
    ]


def versions(peers: Sequence[Peer]) -> str:
    """What was installed, in a line."""
    return ", ".join(dict.fromkeys(peer.version() for peer in peers))


def _ready(peer: Peer, name: str, argument: str, work: Path, journal: Journal) -> list[Contender]:
    if name in journal.failures:
        return []
    try:
        python = environments.python_of(peer.environment, work)
    except environments.NoEnvironmentError as error:
        journal.fail(name, str(error))
        return []
    log = work / "logs" / f"{name.lower().replace(' ', '-').replace(',', '')}.log"
    return [
        Contender(
            name=name, command=(*peer.command, argument), python=python.absolute(), patience=peer.patience, peer=True,
            environment={"PYTHONPATH": str(ROOT), **QUIET}, log=log,
        )
    ]  # fmt: skip
