"""*pilot* and *chain* on Flower's simulation: two Ray actors of one thread, kept for the whole run.

    python -m benchmarks.peers.flower_simulation WORKLOAD

It calls `run_simulation` rather than `flwr run`: the same engine without a SuperLink, which is faster.
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
from benchmarks.peers.exported_workload import WORKERS, ExportedWorkload, RunFigures, accuracy


class GivenCohorts(FedAvg):
    """FedAvg over the workload's cohorts instead of cohorts that it draws itself.

    Args:
        workload: What to train.
        folder: Its folder.
    """

    def __init__(self, workload: ExportedWorkload, folder: Path) -> None:
        super().__init__(fraction_evaluate=0.0, min_available_nodes=workload.num_stores)
        self.workload, self.folder = workload, folder

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Address the stores of the round's cohort."""
        while len(nodes := sorted(grid.get_node_ids())) < self.workload.num_stores:
            time.sleep(0.1)  # nodes register while the server starts; FedAvg itself polls once a second
        return [
            Message(
                content=RecordDict({"arrays": arrays, "config": self._config(server_round, slot)}),
                message_type=MessageType.TRAIN, dst_node_id=nodes[store],
            )
            for slot, store in enumerate(self.workload.cohorts[server_round - 1])
        ]  # fmt: skip

    def _config(self, server_round: int, slot: int) -> ConfigRecord:
        return ConfigRecord({"server-round": server_round, "slot": slot, "workload": str(self.folder)})


def run(folder: Path) -> RunFigures:
    """Simulate the workload in a folder."""
    workload, figures = ExportedWorkload.load(folder), RunFigures()
    module = workload.build()
    server = ServerApp()

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round == 0:
            figures.start()
            return None
        module.load_state_dict(arrays.to_torch_state_dict())
        figures.end_round(0.0, accuracy(workload, module) if workload.num_test else None)
        return None

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        result = GivenCohorts(workload, folder).start(
            grid=grid,
            initial_arrays=ArrayRecord(module.state_dict()),
            num_rounds=workload.num_rounds,
            evaluate_fn=evaluate,
        )
        figures.train_loss = [
            float(result.train_metrics_clientapp[number]["train_loss"]) for number in range(1, workload.num_rounds + 1)
        ]

    torch.set_num_threads(WORKERS)  # the server tests while the clients wait
    with tempfile.TemporaryDirectory(prefix="ray") as temporary:
        run_simulation(
            server_app=server, client_app=flower_client.app, num_supernodes=workload.num_stores,
            backend_config={
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                "init_args": {"num_cpus": WORKERS, "log_to_driver": False, "_temp_dir": temporary},
            },
        )  # fmt: skip
    return figures


if __name__ == "__main__":
    logging.getLogger("flwr").setLevel(logging.WARNING)
    print(json.dumps(run(Path(sys.argv[1])).to_dict()))
