"""The client's side of training on NVIDIA FLARE: site number i trains the store in the i-th place of the cohort.

It is an Executor rather than a script with the Client API, which polls for tasks and results only every half second.
"""

# mypy: disable-error-code="import-not-found,misc"

from pathlib import Path
from typing import Any

import torch
from nvflare.apis.executor import Executor
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

from benchmarks.peers.exported_workload import ExportedWorkload, LocalTrainer
from benchmarks.peers.nvflare_common import reply, site_number


class TrainingExecutor(Executor):
    """Trains one store in each round.

    Args:
        workload: The workload's folder.
    """

    def __init__(self, workload: str) -> None:
        super().__init__()
        self.workload = workload
        self.trainer: LocalTrainer | None = None

    def execute(self, task_name: str, shareable: Any, fl_ctx: Any, abort_signal: Any) -> Any:
        """Train from the global model."""
        if self.trainer is None:  # made in the client's own process, and kept
            torch.set_num_threads(1)  # there are more client processes than cores
            self.trainer = LocalTrainer(ExportedWorkload.load(Path(self.workload)))
        model = FLModelUtils.from_shareable(shareable)
        module = self.trainer.module
        module.load_state_dict({name: torch.from_numpy(value) for name, value in model.params.items()})
        loss = self.trainer.fit(model.current_round + 1, site_number(fl_ctx))
        params = {name: value.numpy() for name, value in module.state_dict().items()}
        return reply(FLModel(params=params, metrics={"train_loss": loss}))
