"""The batch size that a machine gets through its photos fastest with, and the learning rate that goes with it.

Beside what its photos cost, a step costs the same however many there are, and small ones leave parts of a processor
idle; by how much is a matter of the machine. So a client may time larger batches than the configured one on its own
photos, and take the fastest: a power of two times the configured size, within bounds that keep training what it was:

* At most `MOST_GROWTH` times the configured size. With k times the photos in a step, SGD takes k times the rate: Goyal
  et al. 2017, "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", section 2.1. They find that this fails
  early in training, where the model changes quickly, and warm up for five epochs. Here each round is early: momentum
  starts at zero, and clients drift. AdamW, which divides by the gradient's size, takes the root of k times the rate:
  Malladi et al. 2022, "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms", section 5.
* At least `LEAST_STEPS` steps an epoch. The rule takes gradients to be alike over the k steps that one replaces, which
  they are not over a good part of an epoch; and momentum needs some ten steps of each round to build up. On real
  photos, four to eight steps an epoch in place of twenty cost twice the accuracy that eight to fifteen did, and saved
  little more time (docs/how-to/nights-and-slow-machines.md).
* Whatever fits in memory.

A larger batch that is hardly faster is not worth its effect on training: the smallest within `TOLERANCE` of the fastest
is taken.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import median

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fedshelf.core.errors import TrainingError
from fedshelf.core.rng import Rng
from fedshelf.core.text import counted
from fedshelf.data.dataset import PhotoSet
from fedshelf.training.batches import batches
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.free_memory import free_memory, lacks_memory
from fedshelf.training.settings import TrainingSettings
from fedshelf.training.timing import once
from fedshelf.training.trainer import Trainer

logger = logging.getLogger(__name__)

MOST_GROWTH = 4
LEAST_STEPS = 8
TOLERANCE = 0.1
MEMORY_SHARE = 0.25  # of what is free: the backward pass takes as much again, and half is left to others
MOST_TURNS = 5
BUDGET_SECONDS = 1.0  # turns that take longer are not repeated


def candidates(configured: int, num_photos: int) -> tuple[int, ...]:
    """Batch sizes that a client with so many training photos may take, the configured one first."""
    most = min(MOST_GROWTH * configured, num_photos // LEAST_STEPS)
    doubled = (configured << doublings for doublings in range(1, MOST_GROWTH.bit_length()))
    return configured, *(size for size in doubled if size <= most)


def fastest(seconds_per_photo: Mapping[int, float]) -> int:
    """The smallest batch size that is within `TOLERANCE` of the fastest."""
    least = min(seconds_per_photo.values())
    return min(size for size, seconds in seconds_per_photo.items() if seconds <= (1 + TOLERANCE) * least)


def lr_scale(settings: TrainingSettings, batch_size: int) -> float:
    """What the rate is multiplied by where a batch has `batch_size` photos instead of the configured number."""
    growth = batch_size / settings.batch_size
    return math.sqrt(growth) if settings.optimizer == "adamw" else growth


class BatchSizes:
    """What one process has measured for one setup; it is measured when it is first needed.

    Args:
        bench: what is trained on; it is left as it is.
    """

    def __init__(self, bound: BoundModel) -> None:
        self._bench = bound
        self._seconds: Mapping[int, float] | None = None

    def best_for(self, photos: PhotoSet) -> int:
        """The batch size for a client with these training photos."""
        configured = self._bench.settings.batch_size
        allowed = candidates(configured, len(photos))
        if len(allowed) == 1:
            return configured
        if self._seconds is None:
            self._seconds = measure(self._bench, photos, candidates(configured, MOST_GROWTH * configured * LEAST_STEPS))
            told = (f"{1000 * seconds:.2f} ms in batches of {size}" for size, seconds in self._seconds.items())
            logger.info("a photo takes %s", ", ".join(told))
        found = {size: seconds for size, seconds in self._seconds.items() if size in allowed}
        return fastest(found) if found else configured


def measure(bound: BoundModel, photos: PhotoSet, sizes: Sequence[int]) -> dict[int, float]:
    """Seconds per photo in local training, by batch size; sizes that do not fit in memory are missing.

    The sizes are timed in turn, each on the same photos, so that whatever else the machine does hits all of them;
    and by the time on the processor, where one thread computes.

    Args:
        bench: left as it is, to the last bit.
        photos: any number above zero; each is taken as often as it takes to fill the largest batch.
        sizes: ascending.
    """
    sample = _sample(photos, max(sizes))
    with _left_as_it_was(bound):
        epochs = {size: _epoch(bound, sample, size) for size in _that_fit(bound, sample, sizes)}
        times: dict[int, list[float]] = {size: [] for size in epochs}
        started = time.perf_counter()
        for _ in range(MOST_TURNS):
            for size, epoch in epochs.items():
                times[size].append(once(epoch, bound.compute.device, _clock(bound.compute.device)))
            if time.perf_counter() - started > BUDGET_SECONDS:
                break
    return {size: median(found) / len(sample) for size, found in times.items()}


def _clock(device: torch.device) -> Callable[[], float]:
    """A clock that stands still while other programs have the processor, where one thread computes: a store's computer
    has other things to do, too."""
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def _sample(photos: PhotoSet, count: int) -> PhotoSet:
    chosen = np.resize(np.arange(len(photos)), count)
    return PhotoSet(photos.images[chosen], photos.labels[chosen])


def _epoch(bound: BoundModel, sample: PhotoSet, size: int, *, num_steps: int | None = None) -> Callable[[], object]:
    """An epoch of local training at the rate 0, or so many steps of it."""
    settings = replace(bound.settings, batch_size=size, local_epochs=1, loss=None)
    trainer = Trainer(
        bound_model=replace(bound, settings=settings), client="", rng=Rng(0), train=sample, validation=sample
    )  # fmt: skip
    return lambda: trainer.fit(round=0, client_lr=0.0, num_steps=num_steps)


def _that_fit(bound: BoundModel, sample: PhotoSet, sizes: Sequence[int]) -> Iterator[int]:
    """The sizes up to the first that does not fit. A step is taken with each, which warms up, too.

    A GPU says when its memory is at an end; the system would end the process instead. There, what larger batches need
    is known from a pass on the smallest.
    """
    bytes_per_photo = 0.0
    limit = MEMORY_SHARE * free_memory()
    for size in sizes:
        step = _epoch(bound, sample, size, num_steps=1)
        if bytes_per_photo * size > limit or not _survives(step, bound.compute.device):
            logger.info("batches of %s do not fit in memory", counted(size, "photo"))
            return
        if size == sizes[0] and bound.compute.device.type != "cuda":
            bytes_per_photo = _kept_bytes(bound, sample, size) / size
        yield size


def _kept_bytes(bound: BoundModel, sample: PhotoSet, size: int) -> int:
    """Bytes that the forward pass on a batch keeps for its backward pass, beside the model."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    sized = replace(bound, settings=replace(bound.settings, batch_size=size))
    batch = next(batches(sized, sample, Rng(0), round=0, client="", num_steps=1))
    bound.module.train()
    with saved_tensors_hooks(note, lambda tensor: tensor):
        logits_BK = bound.logits(batch.images, forward=bound.module)
    kept.pop(bound.params.vector.untyped_storage().data_ptr(), None)
    total = sum(kept.values())
    del logits_BK  # until here its graph holds what was kept, so that no two have one address
    return total


def _survives(step: Callable[[], object], device: torch.device) -> bool:
    """Whether there is memory for `step`."""
    try:
        step()
    except TrainingError as error:
        if not lacks_memory(error):
            raise
    else:
        return True
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what the step had taken before is of no use in the sizes that fitted
    return False


@contextmanager
def _left_as_it_was(bound: BoundModel) -> Iterator[None]:
    """Steps move batch-norm statistics and counters, and may draw from torch's own generator (dropout)."""
    kept = [bound.params.vector, bound.gradients]
    kept += [buffer for buffer in bound.module.buffers() if not buffer.is_floating_point()]
    before, training = [tensor.clone() for tensor in kept], bound.module.training
    try:
        with torch.random.fork_rng(devices=[bound.compute.device] if bound.compute.device.type == "cuda" else []):
            yield
    finally:
        for tensor, value in zip(kept, before, strict=True):
            tensor.copy_(value)
        bound.module.train(training)
