"""The limit of *pilot* and *chain*: the same steps in plain PyTorch, without a framework.

    python -m benchmarks.training_limit pilot FOLDER 1   # one process with two threads
    python -m benchmarks.training_limit pilot FOLDER 2   # two processes with one thread each: the limit

It prints one line of JSON: the losses and accuracies of every round, and the seconds of all rounds but the first.
Workers are started once and share the global weights. Each sums the changes of its stores; the sums are added when all
workers are done.

Do not make these loops slower: a slower limit would flatter FedShelf. Making them faster is welcome.

Shapes: B batch, H height, W width, C channels, K classes, R = W·C values of a row of pixels.
"""

import json
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Protocol

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import photos
from benchmarks.workloads import MEAN, STD, WORKLOADS, Workload
from fedshelf.core.process_exit import describe_exit

TEST_BATCH = 250


class Barrier(Protocol):
    """A barrier of threads or of processes."""

    def wait(self) -> int:
        """Wait until all have arrived."""
        ...


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Tensors that all workers share.

    Attributes:
        weights: The global weights.
        sums: The summed changes, one list of tensors per worker. They are float64, so that adding them in any order
            rounds to the same float32.
        train_loss: Summed losses [rounds, workers].
        test_correct: Correct answers [rounds, workers].
        ended: When a worker ended a round [rounds, workers].
    """

    weights: list[Tensor]
    sums: list[list[Tensor]]
    train_loss: Tensor
    test_correct: Tensor
    ended: Tensor

    @classmethod
    def allocate(cls, workload: Workload, processes: int) -> "Shared":
        """Allocate them in shared memory, with the workload's first weights."""
        weights = [parameter.detach().clone().share_memory_() for parameter in _network(workload).parameters()]
        zeros = [[torch.zeros_like(w, dtype=torch.float64).share_memory_() for w in weights] for _ in range(processes)]
        figures = (torch.zeros(workload.num_rounds, processes, dtype=torch.float64).share_memory_() for _ in range(3))
        return cls(
            weights=weights, sums=zeros, train_loss=next(figures), test_correct=next(figures), ended=next(figures),
        )  # fmt: skip


class Loop:
    """One worker's photos, network and optimizer."""

    def __init__(self, workload: Workload, folder: Path) -> None:
        data = photos.load(folder)
        self.workload = workload
        self.images, self.labels = torch.from_numpy(data.train_images), torch.from_numpy(data.train_labels)
        self.test_images, self.test_labels = torch.from_numpy(data.test_images), torch.from_numpy(data.test_labels)
        self.module = _network(workload)
        self.weights = [parameter.data for parameter in self.module.parameters()]
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=workload.client_lr, fused=True)
        mean_R, std_R = (torch.tensor(values).repeat(workload.image_size) for values in (MEAN, STD))
        self.scale_R, self.shift_R = 1 / (255 * std_R), -mean_R / std_R
        self.first_row = {store: i * workload.photos_per_store for i, store in enumerate(workload.stores)}

    def fit(self, round: int, store: str) -> float:
        """Train one epoch on a store's photos, and return the sum of their losses (nats)."""
        self.module.train()
        rows = self.first_row[store] + self.workload.order(round, store)
        loss_sum = torch.zeros((), dtype=torch.float64)
        for chosen in rows.split(self.workload.batch_size):
            loss = F.cross_entropy(self.module(self._batch(self.images[chosen])), self.labels[chosen])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss_sum += loss.detach().double() * len(chosen)
        return loss_sum.item()

    def evaluate(self, batches: Iterable[Tensor]) -> float:
        """Return the number of correct answers on batches of rows of the test photos."""
        self.module.eval()
        num_correct = 0.0
        with torch.inference_mode():
            for chosen in batches:
                logits_BK = self.module(self._batch(self.test_images[chosen]))
                num_correct += (logits_BK.argmax(1) == self.test_labels[chosen]).sum().item()
        return num_correct

    def _batch(self, images_BHWC: Tensor) -> Tensor:
        batch, height, width, channels = images_BHWC.shape
        rows_BHR = images_BHWC.view(batch, height, width * channels).float()  # [..., C] is slow: three values per row
        scaled_BHR = torch.addcmul(self.shift_R, rows_BHR, self.scale_R)
        return scaled_BHR.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _network(workload: Workload) -> nn.Module:
    module: nn.Module = workload.build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module


def train(
    rank: int, processes: int, threads: int, workload: Workload, folder: Path, shared: Shared, barrier: Barrier
) -> None:
    """Run one worker's part of all rounds: every `processes`-th store of each cohort, and every such test batch.

    Args:
        rank: The worker's number.
        processes: The number of workers.
        threads: Threads of the worker.
        workload: What to train.
        folder: The folder of its prepared photos.
        shared: The tensors that all workers share.
        barrier: Where workers wait for each other.
    """
    torch.set_num_threads(threads)
    loop = Loop(workload, folder)
    for row in range(workload.num_rounds):
        cohort = workload.cohort(row + 1)
        for store in cohort[rank::processes]:
            torch._foreach_copy_(loop.weights, shared.weights)
            shared.train_loss[row, rank] += loop.fit(row + 1, store)
            for total, weight, before in zip(shared.sums[rank], loop.weights, shared.weights, strict=True):
                total.add_((weight - before).double(), alpha=1 / len(cohort))
        barrier.wait()
        for i in range(rank, len(shared.weights), processes):
            shared.weights[i] += torch.stack([sums[i] for sums in shared.sums]).sum(0).float()
            for sums in shared.sums:
                sums[i].zero_()
        barrier.wait()
        torch._foreach_copy_(loop.weights, shared.weights)
        batches = torch.arange(workload.num_test).split(TEST_BATCH)[rank::processes] if workload.num_test else ()
        shared.test_correct[row, rank] = loop.evaluate(batches)
        shared.ended[row, rank] = time.monotonic()


def run(workload: Workload, folder: Path, *, processes: int, threads: int) -> dict[str, list[float]]:
    """Train, and return the figures of every round (accuracies are fractions, losses nats).

    Args:
        workload: What to train.
        folder: The folder of its prepared photos.
        processes: Worker processes.
        threads: Threads of each.
    """
    shared = Shared.allocate(workload, processes)
    if processes == 1:
        train(0, 1, threads, workload, folder, shared, threading.Barrier(1))
    else:
        context = mp.get_context("spawn")
        barrier = context.Barrier(processes)
        workers = [
            context.Process(
                target=train, args=(rank, processes, threads, workload, folder, shared, barrier), daemon=True
            )
            for rank in range(processes)
        ]
        for worker in workers:
            worker.start()
        running = {worker.sentinel: worker for worker in workers}
        while running:
            for ended in wait(list(running)):
                worker = running.pop(ended)  # type: ignore[arg-type]
                worker.join()
                if worker.exitcode:  # the others would wait for it at the barrier
                    raise SystemExit(f"{describe_exit('a worker of the limit', worker.exitcode)}; see above")
    num_trained = workload.cohort_size * workload.photos_per_store
    figures = {"train_loss": shared.train_loss.sum(1) / num_trained, "round_seconds": shared.ended.amax(1).diff()}
    if workload.num_test:
        figures["test_accuracy"] = shared.test_correct.sum(1) / workload.num_test
    return {name: values.tolist() for name, values in figures.items()}


if __name__ == "__main__":
    name, photos_folder, count = sys.argv[1:]
    print(json.dumps(run(WORKLOADS[name], Path(photos_folder), processes=int(count), threads=2 // int(count))))
