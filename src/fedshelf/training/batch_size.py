"""Measures the batch size with the highest throughput on a machine, and scales the learning rate to it.

Each step has a fixed cost in addition to that of its photos, and small batches leave parts of a processor idle; how
much depends on the machine. A client may therefore time larger batches than configured on its own photos, and use the
fastest: a power of two times the configured size, within bounds that preserve training quality:

* At most `MOST_GROWTH` times the configured size. With k times the photos in a step, SGD uses k times the rate: Goyal
  et al. 2017, "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", section 2.1. They find that this fails
  early in training, where the model changes quickly, and warm up for five epochs. Here each round is early: momentum
  starts at zero, and clients drift. AdamW, which divides by the gradient's size, uses the root of k times the rate:
  Malladi et al. 2022, "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms", section 5.
* At least `LEAST_STEPS` steps an epoch. The rule assumes similar gradients over the k steps that one replaces, which
  does not hold over a large part of an epoch; and momentum needs about ten steps of each round to build up. On real
  photos, four to eight steps an epoch instead of twenty cost twice the accuracy that eight to fifteen did, and saved
  little more time (docs/how-to/nights-and-slow-machines.md).
* Whatever fits in memory.

A larger batch that is barely faster is not worth its effect on training: the smallest within `TOLERANCE` of the fastest
is used.
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
from fedshelf.data.photo_set import PhotoSet
from fedshelf.training.batches import batches
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.resources import free_memory, lacks_memory
from fedshelf.training.settings import TrainingSettings
from fedshelf.training.timing import once
from fedshelf.training.trainer import Trainer

logger = logging.getLogger(__name__)

MOST_GROWTH = 4
LEAST_STEPS = 8
TOLERANCE = 0.1
MEMORY_SHARE = 0.25  # of what is free: the backward pass needs as much again, and half is left to others
MODEL_COPIES = 8  # received, trained, gradients, two moments of the optimizer, the difference, codec and buffers
MOST_TURNS = 5
BUDGET_SECONDS = 1.0  # slower passes are not repeated


def candidates(configured: int, num_photos: int) -> tuple[int, ...]:
    """Batch sizes to consider, the configured one first.

    Args:
        configured: the configured batch size.
        num_photos: the client's training photos.
    """
    most = min(MOST_GROWTH * configured, num_photos // LEAST_STEPS)
    doubled = (configured << doublings for doublings in range(1, MOST_GROWTH.bit_length()))
    return configured, *(size for size in doubled if size <= most)


def fastest(seconds_per_photo: Mapping[int, float]) -> int:
    """The smallest batch size within `TOLERANCE` of the fastest.

    Args:
        seconds_per_photo: measured time by batch size.
    """
    least = min(seconds_per_photo.values())
    return min(size for size, seconds in seconds_per_photo.items() if seconds <= (1 + TOLERANCE) * least)


def lr_scale(settings: TrainingSettings, batch_size: int) -> float:
    """Factor on the learning rate for `batch_size` instead of the configured size."""
    growth = batch_size / settings.batch_size
    return math.sqrt(growth) if settings.optimizer == "adamw" else growth


class BatchSizes:
    """Measurements of one process for one setup, made on first use.

    Args:
        bound: the model to train; left unchanged.
    """

    def __init__(self, bound: BoundModel) -> None:
        self._bound = bound
        self._seconds: Mapping[int, float] | None = None

    def best_for(self, photos: PhotoSet) -> int:
        """The batch size for a client with these training photos."""
        configured = self._bound.settings.batch_size
        allowed = candidates(configured, len(photos))
        if len(allowed) == 1:
            return configured
        if self._seconds is None:
            self._seconds = measure(self._bound, photos, candidates(configured, MOST_GROWTH * configured * LEAST_STEPS))
            listed = (f"{1000 * seconds:.2f} ms in batches of {size}" for size, seconds in self._seconds.items())
            logger.info("a photo takes %s", ", ".join(listed))
        found = {size: seconds for size, seconds in self._seconds.items() if size in allowed}
        return fastest(found) if found else configured


def measure(bound: BoundModel, photos: PhotoSet, sizes: Sequence[int]) -> dict[int, float]:
    """Seconds per photo of local training by batch size, without sizes that do not fit in memory.

    The sizes are timed alternately on the same photos, so that other load on the machine affects them equally, and by
    processor time if a single thread computes.

    Args:
        bound: left unchanged, bit for bit.
        photos: at least one; repeated as needed to fill the largest batch.
        sizes: batch sizes, ascending.
    """
    sample = _sample(photos, max(sizes))
    with _restoring_state(bound):
        epochs = {size: _epoch(bound, sample, size) for size in _sizes_that_fit(bound, sample, sizes)}
        times: dict[int, list[float]] = {size: [] for size in epochs}
        started = time.perf_counter()
        for _ in range(MOST_TURNS):
            for size, epoch in epochs.items():
                times[size].append(once(epoch, bound.compute.device, _clock(bound.compute.device)))
            if time.perf_counter() - started > BUDGET_SECONDS:
                break
    return {size: median(found) / len(sample) for size, found in times.items()}


def _clock(device: torch.device) -> Callable[[], float]:
    """A clock that excludes the time of other programs, if a single thread computes.

    A store's computer has other work, too.
    """
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def _sample(photos: PhotoSet, count: int) -> PhotoSet:
    chosen = np.resize(np.arange(len(photos)), count)
    return PhotoSet(photos.images[chosen], photos.labels[chosen])


def _epoch(bound: BoundModel, sample: PhotoSet, size: int, *, num_steps: int | None = None) -> Callable[[], object]:
    """An epoch of local training at rate 0, or `num_steps` steps of it."""
    settings = replace(bound.settings, batch_size=size, local_epochs=1, loss=None)
    trainer = Trainer(
        bound_model=replace(bound, settings=settings), client="", rng=Rng(0), train=sample, validation=sample
    )  # fmt: skip
    return lambda: trainer.fit(round=0, client_lr=0.0, num_steps=num_steps)


def _sizes_that_fit(bound: BoundModel, sample: PhotoSet, sizes: Sequence[int]) -> Iterator[int]:
    """Yield the sizes up to the first that does not fit. Takes a step with each, which also warms up.

    A GPU reports out of memory, but on a CPU the system would kill the process. There, the need of larger batches is
    extrapolated from a pass on the smallest.
    """
    bytes_per_photo = 0.0
    limit = MEMORY_SHARE * free_memory()
    for size in sizes:
        step = _epoch(bound, sample, size, num_steps=1)
        if bytes_per_photo * size > limit or not _fits_in_memory(step, bound.compute.device):
            logger.info("batches of %s do not fit in memory", counted(size, "photo"))
            return
        if size == sizes[0] and bound.compute.device.type != "cuda":
            bytes_per_photo = _kept_bytes(bound, sample, size) / size
        yield size


def bytes_needed(bound: BoundModel, photos: PhotoSet) -> float:
    """Memory of a training step, estimated from a pass on two photos.

    Args:
        bound: left unchanged, bit for bit.
        photos: at least one.
    """
    model = 4 * len(bound.params.changing) * MODEL_COPIES + 4 * len(bound.params.frozen)
    with _restoring_state(bound):
        step = _kept_bytes(bound, _sample(photos, 2), 2) / 2 * min(bound.settings.batch_size, len(photos))
    return model + 2 * step  # the backward pass needs as much again


def _kept_bytes(bound: BoundModel, sample: PhotoSet, size: int) -> int:
    """Bytes that the forward pass on a batch saves for its backward pass, excluding the model."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    sized = replace(bound, settings=replace(bound.settings, batch_size=size))
    batch = next(batches(sized, sample, Rng(0), round=0, client="", num_steps=1))
    bound.train()
    with saved_tensors_hooks(note, lambda tensor: tensor):
        logits_BK = bound.logits(batch.images, forward=bound.trained)
    kept.pop(bound.params.vector.untyped_storage().data_ptr(), None)
    total = sum(kept.values())
    del logits_BK  # its graph holds the saved tensors until here, so that no two share an address
    return total


def _fits_in_memory(step: Callable[[], object], device: torch.device) -> bool:
    """Whether `step` runs without an out-of-memory error."""
    try:
        step()
    except TrainingError as error:
        if not lacks_memory(error):
            raise
    else:
        return True
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the failed step's memory is of no use to the sizes that fit
    return False


@contextmanager
def _restoring_state(bound: BoundModel) -> Iterator[None]:
    """Restore batch-norm statistics, counters and torch's generator (dropout) after the steps."""
    kept = [bound.params.changing, bound.gradients]
    kept += [buffer for buffer in bound.module.buffers() if not buffer.is_floating_point()]
    before, training = [tensor.clone() for tensor in kept], bound.module.training
    try:
        with torch.random.fork_rng(devices=[bound.compute.device] if bound.compute.device.type == "cuda" else []):
            yield
    finally:
        for tensor, value in zip(kept, before, strict=True):
            tensor.copy_(value)
        bound.train() if training else bound.module.eval()
