"""*pilot* and *chain* on NVIDIA FLARE's simulator: a client per place in the cohort.

    python -m benchmarks.peers.nvflare_simulation WORKLOAD

Each client keeps its process where all fit into memory (*pilot*). Where they do not (*chain*), two threads serve all
clients, and every client starts a new process in every round.
"""

# mypy: disable-error-code="import-not-found"

import sys
import tempfile
from pathlib import Path

from nvflare.job_config.api import FedJob

from benchmarks.peers.exported_workload import WORKERS, ExportedWorkload
from benchmarks.peers.nvflare_client import TrainingExecutor
from benchmarks.peers.nvflare_common import SERVER_CONFIG
from benchmarks.peers.nvflare_server import Averaging

MAX_PROCESSES = 16  # each takes about 350 MB


def main() -> None:
    """Simulate, and print the figures."""
    folder = Path(sys.argv[1]).absolute()
    workload = ExportedWorkload.load(folder)
    clients = workload.cohort_size
    with tempfile.TemporaryDirectory() as temporary:
        figures = Path(temporary) / "figures.json"
        job = FedJob(name=workload.network, min_clients=clients)
        job.to_server(
            Averaging(workload=str(folder), figures=str(figures), num_clients=clients, num_rounds=workload.num_rounds)
        )
        job.to_server(SERVER_CONFIG)
        job.to_clients(TrainingExecutor(workload=str(folder)), tasks=["train"])
        job.simulator_run(
            f"{temporary}/workspace", n_clients=clients, log_config="ERROR",
            threads=clients if clients <= MAX_PROCESSES else WORKERS,
        )  # fmt: skip
        print(figures.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
