"""The other frameworks that are measured: their programs, environments and numbers of rounds."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.measure import Program
from benchmarks.peers import environments, export_workload
from benchmarks.samples import ROOT, SampleLog
from benchmarks.workloads import Workload

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
VARIABLES = {
    "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0",
}  # fmt: skip
TIMEOUT_SECONDS = 1200.0


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A framework's program.

    Attributes:
        name: Its name in tables.
        environment: The name of its file in `requirements/`.
        command: Module and first arguments; the workload's folder or the megabytes follow.
        max_rounds: Fewer rounds than the workload has, by workload, where all would take too long.
    """

    name: str
    environment: str
    command: Sequence[str]
    max_rounds: Mapping[str, int] = field(default_factory=dict)

    def version(self) -> str:
        """Return the package that its requirements name first, such as `flwr 1.41.0`."""
        lines = (environments.REQUIREMENTS / f"{self.environment}.txt").read_text(encoding="utf-8").splitlines()
        pinned = next(line for line in lines if "==" in line)
        return pinned.partition("[")[0].partition("==")[0] + " " + pinned.partition("==")[2]


SIMULATORS = (
    Peer(
        name="Flower simulation", environment="flower-simulation", command=("benchmarks.peers.flower_simulation",),
    ),
    Peer(
        name="NVIDIA FLARE simulator", environment="nvflare", command=("benchmarks.peers.nvflare_simulation",),
        max_rounds={"chain": 1},
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


def simulation_programs(
    workload: Workload, photos: Path, work: Path, log: SampleLog, rounds: int | None = None
) -> list[Program]:
    """Return the simulators' programs; those that cannot run are recorded as failed.

    Args:
        workload: What to train.
        photos: The folder of its prepared photos.
        work: Where environments, exported workloads and logs are kept.
        log: Where a failure is recorded.
        rounds: The most rounds to run.
    """
    found = []
    for peer in SIMULATORS:
        count = min(workload.num_rounds, peer.max_rounds.get(workload.name, sys.maxsize), rounds or sys.maxsize)
        folder = work / "workloads" / f"{workload.name}-{count}"
        folder.mkdir(parents=True, exist_ok=True)
        export_workload.export(replace(workload, num_rounds=count), photos, folder)
        found += _program(peer, peer.name, str(folder.absolute()), work, log)
    return found


def wire_programs(megabytes: int, work: Path, log: SampleLog) -> list[Program]:
    """Return the deployments' programs; those that cannot run are recorded as failed."""
    return [
        program
        for peer in DEPLOYMENTS
        for program in _program(peer, f"{peer.name}, {megabytes} MB", str(megabytes), work, log)
    ]


def versions(peers: Sequence[Peer]) -> str:
    """Return the installed versions in one line."""
    return ", ".join(dict.fromkeys(peer.version() for peer in peers))


def _program(peer: Peer, name: str, argument: str, work: Path, log: SampleLog) -> list[Program]:
    if name in log.failures:
        return []
    try:
        python = environments.python_of(peer.environment, work)
    except environments.PeerEnvironmentError as error:
        log.fail(name, str(error))
        return []
    output = work / "logs" / f"{name.lower().replace(' ', '-').replace(',', '')}.log"
    return [
        Program(
            name=name, command=(*peer.command, argument), python=python.absolute(), timeout=TIMEOUT_SECONDS,
            is_peer=True, environment=VARIABLES, log=output,
        )
    ]  # fmt: skip
