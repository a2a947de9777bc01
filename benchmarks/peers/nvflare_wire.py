"""*wire* on NVIDIA FLARE: its simulator, or its deployment on one machine, which it calls POC and which uses TLS.

python -m benchmarks.peers.nvflare_wire simulator 10     # megabytes
python -m benchmarks.peers.nvflare_wire poc 10
"""

# mypy: disable-error-code="import-not-found"

import os
import sys
import tempfile
from pathlib import Path

from nvflare.job_config.api import FedJob
from nvflare.recipe.poc_env import PocEnv

from benchmarks.peers.nvflare_common import SERVER_CONFIG
from benchmarks.peers.nvflare_wire_client import AddingExecutor
from benchmarks.peers.nvflare_wire_server import Mean
from benchmarks.wire_limit import NUM_CLIENTS


def make_job(megabytes: int, figures: Path, *, own_process: bool) -> FedJob:
    """Build the job.

    Args:
        megabytes: Size of the model.
        figures: The file for the figures.
        own_process: Whether the job has a process in addition to the server's (POC).
    """
    clients = [
        f"site-{number + 1}" for number in range(NUM_CLIENTS)
    ]  # without these it starts with the clients that are ready
    job = FedJob(name="wire", min_clients=NUM_CLIENTS, mandatory_clients=clients)
    job.to_server(Mean(megabytes=megabytes, figures=str(figures), own_process=own_process))
    job.to_server(SERVER_CONFIG)
    job.to_clients(AddingExecutor(), tasks=["train"])
    return job


def simulate(megabytes: int, folder: Path, figures: Path) -> None:
    """Run the job in the simulator."""
    job = make_job(megabytes, figures, own_process=False)
    job.simulator_run(str(folder / "workspace"), n_clients=NUM_CLIENTS, threads=NUM_CLIENTS, log_config="ERROR")


def deploy(megabytes: int, folder: Path, figures: Path) -> None:
    """Run the job in a POC deployment."""
    environment = PocEnv(num_clients=NUM_CLIENTS)
    try:
        job = environment.deploy(make_job(megabytes, figures, own_process=True))
        environment.get_job_result(job)  # waits until the job ends
    finally:
        environment.stop(clean_up=True)


def main() -> None:
    """Run it, and print the figures."""
    kind, megabytes = sys.argv[1], int(sys.argv[2])
    with tempfile.TemporaryDirectory() as name:
        folder, figures = Path(name), Path(name) / "figures.json"
        os.environ |= {"HOME": name, "NVFLARE_POC_WORKSPACE": str(folder / "poc")}  # it writes into both
        {"simulator": simulate, "poc": deploy}[kind](megabytes, folder, figures)
        print(figures.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
