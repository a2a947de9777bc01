"""*pilot* and *chain* on pfl-research.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m benchmarks.peers.pfl_simulation JOB

Its loop takes every second member of a cohort in each of two processes with one thread, and sums over both with
gloo. Started without `torch.distributed.run` it is one process with all threads.
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

from benchmarks.peers.job import TEST_BATCH, WORKERS, Job, Report

TRAIN_LOSS, TEST_ACCURACY = StringMetricName("training loss"), "test accuracy"


class Module(nn.Module):
    """The network with the two methods that pfl asks for; adds up the losses of the photos as they come by."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job
        self.network = job.build()
        self.loss_sum = 0.0

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        self.train()
        loss = F.cross_entropy(self.network(self.job.pixels(images)), labels)
        self.loss_sum += loss.item() * len(labels)
        return loss

    @torch.inference_mode()
    def metrics(self, images: Tensor, labels: Tensor) -> dict[str, Weighted]:
        self.eval()
        correct = (self.network(self.job.pixels(images)).argmax(1) == labels).sum().item()
        return {TEST_ACCURACY: Weighted(correct, len(labels))}


class Averaging(FederatedAveraging):
    """FederatedAveraging that tells the training loss, and does not score every store's photos once more."""

    def get_next_central_contexts(self, *args: Any, **kwargs: Any) -> Any:
        contexts, model, metrics = super().get_next_central_contexts(*args, **kwargs)
        if contexts is not None:  # the first round would evaluate each store before and after training
            contexts = tuple(replace(context, do_evaluation=False) for context in contexts)
        return contexts, model, metrics

    def train_one_user(self, initial_model_state: Any, model: Any, user_dataset: Any, central_context: Any) -> Any:
        module = model.pytorch_model
        module.loss_sum = 0.0
        statistics, metrics = super().train_one_user(initial_model_state, model, user_dataset, central_context)
        metrics[TRAIN_LOSS] = Weighted(module.loss_sum, len(user_dataset))
        return statistics, metrics


class Rounds(TrainingProcessCallback):
    """After each round: the test, shared by all processes, and the round's figures."""

    def __init__(self, job: Job) -> None:
        self.report = Report()
        self.test = Dataset(job.test).get_worker_partition() if job.num_test else None

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        self.report.start()
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        accuracy = None
        if self.test is not None:
            metrics = model.evaluate(self.test, eval_params=NNEvalHyperParams(local_batch_size=TEST_BATCH))
            accuracy = all_reduce_metrics(metrics)[TEST_ACCURACY].overall_value
        self.report.end_round(float(aggregate_metrics[TRAIN_LOSS].overall_value), accuracy)
        return False, Metrics()


def run(job: Job) -> Report:
    images, labels = job.train

    def stores_photos(user: tuple[int, int]) -> PyTorchTensorDataset:
        rows = torch.from_numpy(job.rows[user])
        return PyTorchTensorDataset((images[rows], labels[rows]), user_id=str(user))

    users = [(row, slot) for row in range(job.num_rounds) for slot in range(job.cohort_size)]
    stores = FederatedDataset(stores_photos, MinimizeReuseUserSampler(users))
    module = Module(job)
    model = PyTorchModel(
        module, lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, fused=True),
        central_optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
    )  # fmt: skip
    rounds = Rounds(job)
    Averaging().run(
        NNAlgorithmParams(
            central_num_iterations=job.num_rounds, evaluation_frequency=job.num_rounds + 1,
            train_cohort_size=job.cohort_size, val_cohort_size=None,
        ),
        SimulatedBackend(stores, stores, postprocessors=[WeightByUser()]), model,
        NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=job.client_lr, local_batch_size=job.batch_size,
        ),
        callbacks=[rounds], send_metrics_to_platform=False,
    )  # fmt: skip
    return rounds.report


def main() -> None:
    logging.getLogger("pfl").setLevel(logging.WARNING)
    torch.set_num_threads(max(1, WORKERS // distributed.world_size))
    report = run(Job.load(Path(sys.argv[1])))
    if distributed.global_rank == 0:
        print(json.dumps(report.figures()), flush=True)
    if distributed.world_size > 1:
        torch.distributed.barrier()
        os._exit(
            0
        )  # gloo's threads now and then abort a process that takes them down, with or without destroying the group


if __name__ == "__main__":
    main()
