"""The server's side of a job on NVIDIA FLARE: its FedAvg, with the first model, the test and the figures of ours."""

# mypy: disable-error-code="import-not-found,misc"

import json
from pathlib import Path

import torch
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.workflows.fedavg import FedAvg

from benchmarks.peers.job import Job, Report, accuracy
from benchmarks.peers.nvflare_common import CHECK_SECONDS


class Averaging(FedAvg):
    """FedAvg over all clients. Nothing is stored: the other contenders store nothing either."""

    def __init__(self, job: str, figures: str, num_clients: int, num_rounds: int) -> None:
        super().__init__(
            num_clients=num_clients, num_rounds=num_rounds, persistor_id="", task_check_period=CHECK_SECONDS
        )
        self.job, self.figures = job, figures

    def load_model(self) -> FLModel:
        self.loaded, self.report = Job.load(Path(self.job)), Report()
        self.module = self.loaded.build()
        self.report.start()
        return FLModel(params={name: value.numpy() for name, value in self.module.state_dict().items()})

    def save_model(self, model: FLModel) -> None:
        """Called after each round."""
        scored = None
        if self.loaded.num_test:
            self.module.load_state_dict({name: torch.as_tensor(value) for name, value in model.params.items()})
            scored = accuracy(self.loaded, self.module)
        self.report.end_round(float(model.metrics["train_loss"]), scored)
        if len(self.report.ended) == self.loaded.num_rounds:
            Path(self.figures).write_text(json.dumps(self.report.figures()), encoding="utf-8")
