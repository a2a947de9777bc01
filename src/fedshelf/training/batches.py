"""A client's photos as batches: how they are drawn and augmented in a round, and prefetching.

Shapes: B batch, H height, W width, C channels, V views, D features.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, repeat
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedshelf.core.rng import Rng
from fedshelf.data.photo_set import PhotoSet
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.distillation import Rendering, Teacher

_T = TypeVar("_T")
_END = object()


class Batch(NamedTuple):
    """A batch on the training device.

    Attributes:
        images: photos [B, 3, H, W], normalized, channels_last; or features [B, D].
        labels: labels [B].
        teacher_logits: a teacher's logits [B, K] of the same views; None without a teacher.
    """

    images: Tensor
    labels: Tensor
    teacher_logits: Tensor | None = None


class Amount(NamedTuple):
    """How many photos to draw from, and how many batches to draw.

    Attributes:
        num_photos: photos to draw from.
        batch_size: photos in a batch.
        epochs: passes over the photos, unless `num_steps` is given.
        num_steps: number of batches, instead of epochs.
        smallest: photos of the smallest batch that can be trained on.
    """

    num_photos: int
    batch_size: int
    epochs: int
    num_steps: int | None = None
    smallest: int = 1


Draw: TypeAlias = Callable[[Amount, torch.Generator], Iterator[NDArray[np.int64]]]
"""Draws the photos of each batch, as indices; the generator is the run's, keyed by round and client."""


def shuffled(amount: Amount, generator: torch.Generator) -> Iterator[NDArray[np.int64]]:
    """`Draw` every photo once an epoch, in a new order each epoch."""
    shuffles = _shuffles(amount.num_photos, generator, None if amount.num_steps is not None else amount.epochs)
    size = amount.batch_size
    cuts = (order[at : at + size] for order in shuffles for at in range(0, len(order), size))
    return islice((chosen for chosen in cuts if len(chosen) >= amount.smallest), amount.num_steps)


def batches(
    bound: BoundModel,
    photos: PhotoSet,
    rng: Rng,
    *,
    round: int,
    client: str,
    epochs: int | None = None,
    num_steps: int | None = None,
    part: str = "",
    draw: Draw = shuffled,
    teacher: Teacher | None = None,
) -> Iterator[Batch]:
    """Yield augmented batches.

    A last batch of one photo is dropped where batch normalization cannot use it, unless all batches are of one
    photo.

    Args:
        bound: the model to train.
        photos: the client's training photos.
        rng: the run's root generator.
        round: keys the draws.
        client: keys the draws.
        epochs: number of epochs; by default as configured.
        num_steps: number of batches, instead of epochs.
        part: identifies one of several trainings in a round, each with its own order.
        draw: draws the photos of each batch.
        teacher: is asked about the same views.
    """
    settings = bound.settings
    order_rng = rng.fork(round=round, client=client, purpose=f"shuffle{part}").torch()
    augment_rng = (
        rng.fork(round=round, client=client, purpose=f"augment{part}").torch() if settings.augmentation else None
    )
    smallest = 2 if bound.has_batch_norm and min(len(photos), settings.batch_size) > 1 else 1
    amount = Amount(
        len(photos), settings.batch_size, settings.local_epochs if epochs is None else epochs, num_steps, smallest
    )
    for chosen in draw(amount, order_rng):
        if not len(chosen):
            yield Batch(torch.empty(0, device=bound.compute.device), torch.empty(0, dtype=torch.int64))
            continue
        images_BHWC, labels_B = gather(photos, chosen)
        labels_B = _moved(labels_B, bound.compute.device)
        logits_BK = None if teacher is None else _asked(teacher, bound, photos, chosen, augment_rng)
        images = _prepare(bound, _moved(images_BHWC, bound.compute.device), augment_rng)
        yield Batch(images, labels_B, logits_BK)


def _shuffles(count: int, generator: torch.Generator, epochs: int | None) -> Iterator[NDArray[np.int64]]:
    """Yield `epochs` shuffles of `count` indices; endlessly if None."""
    for _ in repeat(None) if epochs is None else repeat(None, epochs):
        yield torch.randperm(count, generator=generator).numpy()


def gather(photos: PhotoSet, chosen: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Copy the `chosen` photos [B, H, W, C] (or features [B, V, D]) and labels [B]."""
    return torch.from_numpy(photos.images[chosen]), torch.from_numpy(photos.labels[chosen])


def prefetch(items: Iterator[_T]) -> Iterator[_T]:
    """Yield the same items in the same order, each produced in a background thread while the previous one is used.

    This pays off if producing and using an item need different processors: the CPU prepares a batch while a GPU trains
    on the previous one. Exceptions from `items` are raised here.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as maker:
        coming = maker.submit(next, items, _END)
        while (item := coming.result()) is not _END:
            coming = maker.submit(next, items, _END)
            yield item  # type: ignore[misc]


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to the device; asynchronously for a GPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _prepare(bound: BoundModel, images_BHWC: Tensor, generator: torch.Generator | None) -> Tensor:
    if images_BHWC.dim() == 3:
        return _one_view(images_BHWC, generator)
    render = Rendering(bound.normalization, bound.settings.augmentation, bound.compute.device)
    return render(images_BHWC, generator)


def _asked(
    teacher: Teacher, bound: BoundModel, photos: PhotoSet, chosen: NDArray[np.int64], generator: torch.Generator | None
) -> Tensor:
    """The teacher's logits [B, K] of the views that `generator` will draw next, without drawing them from it."""
    images_NHWC = photos.images if photos.teacher_images is None else photos.teacher_images
    same = None
    if generator is not None:
        same = torch.Generator()
        same.set_state(generator.get_state())
    return teacher.of_photos(
        images_NHWC[chosen], augmentation=bound.settings.augmentation, generator=same, device=bound.compute.device
    )  # fmt: skip


def _one_view(features_BVD: Tensor, generator: torch.Generator | None) -> Tensor:
    """The features [B, D] of one view of each photo: a random one, or the first without augmentation."""
    count, views, _ = features_BVD.shape
    if generator is None or views == 1:
        return features_BVD[:, 0].contiguous()
    chosen = torch.randint(views, (count,), generator=generator).to(features_BVD.device)
    return features_BVD[torch.arange(count, device=features_BVD.device), chosen]
