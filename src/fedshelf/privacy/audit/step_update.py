"""The update that a store would send after one step on a few photos, and the gradient that it gives away.

The step is that of the store's own trainer, with its augmentation, loss, optimizer and noise. Someone who knows the
run's settings inverts the optimizer: the first step of SGD with Nesterov momentum m moves the values w by
-lr · (1 + m) · (g + decay · w). A bound on the gradient's norm leaves its direction as it is. AdamW's first step tells
little more than the signs of g.

Shapes: B photos, S shared values, T shared trainable values.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedshelf.core.messages import PARAMS, Broadcast, Purpose, TaskKey, Upload
from fedshelf.core.params import Params, Segment
from fedshelf.data.photo_set import PhotoSet
from fedshelf.training.batches import Batch, shuffled
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.loop import LocalRun
from fedshelf.training.trainer import Trainer

Seal = Callable[[Upload], Upload]
"""What the stages between training and wire make of an upload, as the server reads it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StepUpdate:
    """An update and what it was made of.

    Attributes:
        gradient: [T]: what the update says of the gradient of the step.
        images: [B, 3, H, W]: the views of the photos that were trained on, normalized; or their features [B, D].
        labels: [B]: their labels.
    """

    gradient: Tensor
    images: Tensor
    labels: Tensor


def step_update(
    trainer: Trainer, photos: PhotoSet, shared: Tensor, *, client_lr: float, seal: Seal = lambda upload: upload
) -> StepUpdate:  # fmt: skip
    """Take one step on all of `photos`, and read the upload.

    Args:
        trainer: the store's trainer. One with noise adds it, but takes all photos instead of a sample: the attacker
            knows, or guesses, that they were drawn.
        photos: the photos of the step.
        shared: [S]: the model that the step starts from; the bound model holds it afterwards.
        client_lr: learning rate.
        seal: what becomes of the upload on its way.
    """
    bound, seen = trainer.bound_model, list[Batch]()
    count = len(photos)

    def run(local_run: LocalRun) -> float:
        local_run.batches = _noted(local_run.batches, seen)
        return trainer.run(local_run)

    alone = replace(
        trainer.having(replace(bound.settings, batch_size=count, local_epochs=1)), train=photos, run=run, draw=shuffled,
        phases=trainer.phases[:1], growth=1,
    )  # fmt: skip
    key = TaskKey(run_id="audit", round=1, attempt=0)
    broadcast = Broadcast(
        key=key, purpose=Purpose.TRAIN, client_lr=client_lr, vectors={PARAMS: shared}, num_steps=1
    )  # fmt: skip
    before = bound.params.changing.clone()
    try:
        delta = seal(alone.upload(broadcast)).delta
    finally:
        bound.params.changing.copy_(before)
        bound.load(shared)
    (batch,) = seen
    gradient = gradient_of(bound, shared, delta, client_lr=trainer.lr_scale * client_lr)
    return StepUpdate(gradient=gradient, images=batch.images.detach(), labels=batch.labels)


def gradient_of(bound: BoundModel, shared: Tensor, delta: Tensor, *, client_lr: float) -> Tensor:
    """[T]: the gradient that a first step of `client_lr` from `shared` [S] to `shared` + `delta` was made with."""
    settings, num_trainable = bound.settings, bound.params.layout.num_trainable
    gradient = -delta[:num_trainable] / client_lr
    if settings.optimizer == "sgd":
        gradient = gradient / (1 + settings.momentum)
    if settings.has_head_lr and bound.head_range is not None:
        factors = torch.full_like(gradient, settings.backbone_lr_factor)
        factors[bound.head_range] = settings.head_lr_factor
        gradient = torch.where(factors > 0, gradient / factors, 0.0)
    return gradient - settings.weight_decay * shared[:num_trainable]


def named(bound: BoundModel, gradient: Tensor) -> dict[str, Tensor]:
    """A gradient [T] as tensors by name."""
    vector = torch.zeros_like(bound.params.changing)
    vector[: len(gradient)] = gradient
    views = Params(vector, bound.params.layout).views(frozen=False)
    return {spec.name: views[spec.name] for spec in bound.params.layout.tensors if spec.segment is Segment.TRAINABLE}


def _noted(batches: Iterator[Batch], seen: list[Batch]) -> Iterator[Batch]:
    for batch in batches:
        seen.append(batch)
        yield batch
