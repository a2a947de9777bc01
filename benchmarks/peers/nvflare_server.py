"""The server's side of training on NVIDIA FLARE: its FedAvg, with the workload's first model, test and figures."""

# mypy: disable-error-code="import-not-found,misc"

import json
from pathlib import Path

import torch
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.workflows.fedavg import FedAvg

from benchmarks.peers.exported_workload import ExportedWorkload, RunFigures, accuracy
from benchmarks.peers.nvflare_common import CHECK_SECONDS


class Averaging(FedAvg):
    """FedAvg over all clients. It stores nothing, as the other programs.

    Args:
        workload: The workload's folder.
        figures: The file for the figures.
        num_clients: The number of clients.
        num_rounds: The number of rounds.
    """

    def __init__(self, workload: str, figures: str, num_clients: int, num_rounds: int) -> None:
        super().__init__(
            num_clients=num_clients, num_rounds=num_rounds, persistor_id="", task_check_period=CHECK_SECONDS
        )
        self.workload, self.figures = workload, figures

    def load_model(self) -> FLModel:
        """Build the first model."""
        self.loaded, self.rounds = ExportedWorkload.load(Path(self.workload)), RunFigures()
        self.module = self.loaded.build()
        self.rounds.start()
        return FLModel(params={name: value.numpy() for name, value in self.module.state_dict().items()})

    def save_model(self, model: FLModel) -> None:
        """Record the round; called after each one."""
        test_accuracy = None
        if self.loaded.num_test:
            self.module.load_state_dict({name: torch.as_tensor(value) for name, value in model.params.items()})
            test_accuracy = accuracy(self.loaded, self.module)
        self.rounds.end_round(float(model.metrics["train_loss"]), test_accuracy)
        if len(self.rounds.ended) == self.loaded.num_rounds:
            Path(self.figures).write_text(json.dumps(self.rounds.to_dict()), encoding="utf-8")
