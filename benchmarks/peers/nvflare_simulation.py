"""*pilot* and *chain* on NVIDIA FLARE's simulator: a client per place in the cohort.

    python -m benchmarks.peers.nvflare_simulation JOB

Each client keeps its process where all fit into memory (*pilot*). Where they do not (*chain*), two threads
pass the clients from process to process, and every client starts a new one in every round.
"""

# mypy: disable-error-code="import-not-found"

import sys
import tempfile
from pathlib import Path

from nvflare.job_config.api import FedJob

from benchmarks.peers.job import WORKERS, Job
from benchmarks.peers.nvflare_client import Training
from benchmarks.peers.nvflare_common import SERVER_CONFIG
from benchmarks.peers.nvflare_server import Averaging

MOST_PROCESSES = 16  # each takes about 350 MB


def main() -> None:
    folder = Path(sys.argv[1]).absolute()
    loaded = Job.load(folder)
    clients = loaded.cohort_size
    with tempfile.TemporaryDirectory() as temporary:
        figures = Path(temporary) / "figures.json"
        job = FedJob(name=loaded.network, min_clients=clients)
        job.to_server(
            Averaging(job=str(folder), figures=str(figures), num_clients=clients, num_rounds=loaded.num_rounds)
        )
        job.to_server(SERVER_CONFIG)
        job.to_clients(Training(job=str(folder)), tasks=["train"])
        job.simulator_run(
            f"{temporary}/workspace", n_clients=clients, log_config="ERROR",
            threads=clients if clients <= MOST_PROCESSES else WORKERS,
        )  # fmt: skip
        print(figures.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
