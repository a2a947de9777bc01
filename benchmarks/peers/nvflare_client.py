"""The client's side of training on NVIDIA FLARE: site number i trains the store in the i-th place of the cohort.

An Executor, not a script with the Client API: that looks only every half second for a task, and for a result.
"""

# mypy: disable-error-code="import-not-found,misc"

from pathlib import Path
from typing import Any

import torch
from nvflare.apis.executor import Executor
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.utils.fl_model_utils import FLModelUtils

from benchmarks.peers.job import Job, Store
from benchmarks.peers.nvflare_common import reply, site_number


class Training(Executor):
    def __init__(self, job: str) -> None:
        super().__init__()
        self.job = job
        self.store: Store | None = None

    def execute(self, task_name: str, shareable: Any, fl_ctx: Any, abort_signal: Any) -> Any:
        if self.store is None:  # in the client's own process, kept while that lives
            torch.set_num_threads(1)  # one process per client, more of them than cores
            self.store = Store(Job.load(Path(self.job)))
        model = FLModelUtils.from_shareable(shareable)
        module = self.store.module
        module.load_state_dict({name: torch.from_numpy(value) for name, value in model.params.items()})
        loss = self.store.fit(model.current_round + 1, site_number(fl_ctx))
        params = {name: value.numpy() for name, value in module.state_dict().items()}
        return reply(FLModel(params=params, metrics={"train_loss": loss}))
