"""*pilot* and *chain* on pfl-research.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m benchmarks.peers.pfl_simulation WORKLOAD

Each of two processes with one thread trains every second member of a cohort, and gloo sums over both. Without
`torch.distributed.run` it is one process with all threads.
"""

# mypy: disable-error-code="import-not-found,misc"

import json
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByUser
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import MinimizeReuseUserSampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops.common_ops import all_reduce_metrics
from pfl.internal.ops.pytorch_ops import distributed
from pfl.metrics import Metrics, StringMetricName, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from benchmarks.peers.exported_workload import TEST_BATCH, WORKERS, ExportedWorkload, RunFigures

TRAIN_LOSS, TEST_ACCURACY = StringMetricName("training loss"), "test accuracy"


class Module(nn.Module):
    """The network with the two methods that pfl asks for; it sums the losses of the photos as it trains.

    Args:
        workload: What to train.
    """

    def __init__(self, workload: ExportedWorkload) -> None:
        super().__init__()
        self.workload = workload
        self.network = workload.build()
        self.loss_sum = 0.0

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the training loss of a batch."""
        self.train()
        loss = F.cross_entropy(self.network(self.workload.pixels(images)), labels)
        self.loss_sum += loss.item() * len(labels)
        return loss

    @torch.inference_mode()
    def metrics(self, images: Tensor, labels: Tensor) -> dict[str, Weighted]:
        """Return the accuracy on a batch."""
        self.eval()
        correct = (self.network(self.workload.pixels(images)).argmax(1) == labels).sum().item()
        return {TEST_ACCURACY: Weighted(correct, len(labels))}


class Averaging(FederatedAveraging):
    """FederatedAveraging that reports the training loss, and does not evaluate every store's photos in addition."""

    def get_next_central_contexts(self, *args: Any, **kwargs: Any) -> Any:
        """Switch the evaluation of stores off."""
        contexts, model, metrics = super().get_next_central_contexts(*args, **kwargs)
        if contexts is not None:  # the first round would evaluate each store before and after training
            contexts = tuple(replace(context, do_evaluation=False) for context in contexts)
        return contexts, model, metrics

    def train_one_user(self, initial_model_state: Any, model: Any, user_dataset: Any, central_context: Any) -> Any:
        """Train, and add the training loss to the metrics."""
        module = model.pytorch_model
        module.loss_sum = 0.0
        statistics, metrics = super().train_one_user(initial_model_state, model, user_dataset, central_context)
        metrics[TRAIN_LOSS] = Weighted(module.loss_sum, len(user_dataset))
        return statistics, metrics


class Rounds(TrainingProcessCallback):
    """Runs the test after each round, shared by all processes, and collects the round's figures.

    Args:
        workload: What is trained.
    """

    def __init__(self, workload: ExportedWorkload) -> None:
        self.figures = RunFigures()
        self.test = Dataset(workload.test).get_worker_partition() if workload.num_test else None

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        """Record when the first round begins."""
        self.figures.start()
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Test the model, and record the round."""
        accuracy = None
        if self.test is not None:
            metrics = model.evaluate(self.test, eval_params=NNEvalHyperParams(local_batch_size=TEST_BATCH))
            accuracy = all_reduce_metrics(metrics)[TEST_ACCURACY].overall_value
        self.figures.end_round(float(aggregate_metrics[TRAIN_LOSS].overall_value), accuracy)
        return False, Metrics()


def run(workload: ExportedWorkload) -> RunFigures:
    """Simulate the workload."""
    images, labels = workload.train

    def photos_of(user: tuple[int, int]) -> PyTorchTensorDataset:
        rows = torch.from_numpy(workload.rows[user])
        return PyTorchTensorDataset((images[rows], labels[rows]), user_id=str(user))

    users = [(row, slot) for row in range(workload.num_rounds) for slot in range(workload.cohort_size)]
    stores = FederatedDataset(photos_of, MinimizeReuseUserSampler(users))
    module = Module(workload)
    model = PyTorchModel(
        module, lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, fused=True),
        central_optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
    )  # fmt: skip
    rounds = Rounds(workload)
    Averaging().run(
        NNAlgorithmParams(
            central_num_iterations=workload.num_rounds, evaluation_frequency=workload.num_rounds + 1,
            train_cohort_size=workload.cohort_size, val_cohort_size=None,
        ),
        SimulatedBackend(stores, stores, postprocessors=[WeightByUser()]), model,
        NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=workload.client_lr, local_batch_size=workload.batch_size,
        ),
        callbacks=[rounds], send_metrics_to_platform=False,
    )  # fmt: skip
    return rounds.figures


def main() -> None:
    """Simulate, and print the figures."""
    logging.getLogger("pfl").setLevel(logging.WARNING)
    torch.set_num_threads(max(1, WORKERS // distributed.world_size))
    figures = run(ExportedWorkload.load(Path(sys.argv[1])))
    if distributed.global_rank == 0:
        print(json.dumps(figures.to_dict()), flush=True)
    if distributed.world_size > 1:
        torch.distributed.barrier()
        os._exit(0)  # an ordinary exit is sometimes aborted by gloo's threads


if __name__ == "__main__":
    main()
