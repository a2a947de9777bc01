"""*pilot* and *chain* on Flower's simulation: two Ray actors of one thread, kept for the whole run.

    python -m benchmarks.peers.flower_simulation JOB

`run_simulation` instead of `flwr run`: the same engine without a SuperLink around it, hence faster.
"""

# mypy: disable-error-code="misc,untyped-decorator"

import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks.peers import flower_client
from benchmarks.peers.job import WORKERS, Job, Report, accuracy


class GivenCohorts(FedAvg):
    """FedAvg over the job's cohorts instead of cohorts that it draws itself."""

    def __init__(self, job: Job, folder: Path) -> None:
        super().__init__(fraction_evaluate=0.0, min_available_nodes=job.num_stores)
        self.job, self.folder = job, folder

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        while len(nodes := sorted(grid.get_node_ids())) < self.job.num_stores:
            time.sleep(0.1)  # they register while the server's program starts; FedAvg itself would look every second
        return [
            Message(
                content=RecordDict({"arrays": arrays, "config": self._config(server_round, slot)}),
                message_type=MessageType.TRAIN, dst_node_id=nodes[store],
            )
            for slot, store in enumerate(self.job.cohorts[server_round - 1])
        ]  # fmt: skip

    def _config(self, server_round: int, slot: int) -> ConfigRecord:
        return ConfigRecord({"server-round": server_round, "slot": slot, "job": str(self.folder)})


def run(folder: Path) -> Report:
    job, report = Job.load(folder), Report()
    module = job.build()
    server = ServerApp()

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round == 0:
            report.start()
            return None
        module.load_state_dict(arrays.to_torch_state_dict())
        report.end_round(0.0, accuracy(job, module) if job.num_test else None)
        return None

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        result = GivenCohorts(job, folder).start(
            grid=grid, initial_arrays=ArrayRecord(module.state_dict()), num_rounds=job.num_rounds, evaluate_fn=evaluate
        )
        report.train_loss = [
            float(result.train_metrics_clientapp[number]["train_loss"]) for number in range(1, job.num_rounds + 1)
        ]

    torch.set_num_threads(WORKERS)  # the server tests while the clients wait
    with tempfile.TemporaryDirectory(prefix="ray") as temporary:
        run_simulation(
            server_app=server, client_app=flower_client.app, num_supernodes=job.num_stores,
            backend_config={
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                "init_args": {"num_cpus": WORKERS, "log_to_driver": False, "_temp_dir": temporary},
            },
        )  # fmt: skip
    return report


def main() -> None:
    logging.getLogger("flwr").setLevel(logging.WARNING)
    print(json.dumps(run(Path(sys.argv[1])).figures()))


if __name__ == "__main__":
    main()
