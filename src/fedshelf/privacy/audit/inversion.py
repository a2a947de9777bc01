"""Gradient inversion: Geiping et al. 2020, "Inverting Gradients - How easy is it to break privacy in federated
learning?", section 4.

    1  x <- noise
    2  for each of T iterations:
    3    g <- gradient of the model's loss on x
    4    L <- 1 - <g, g*> / (||g|| ||g*||) + alpha · TV(x)        g*: the gradient that was observed
    5    take a step of Adam with the signs of the gradient of L with respect to x
    6    put pixels back between black and white

The step width falls to a tenth after 3/8, 5/8 and 7/8 of the iterations, as in the authors' code. Labels are given to
the attack: they can be read off the gradient (`label_inference`).

Differs from the paper: one start, no best of several. With the sum of n stores (`num_stores`), the photos of all n are
sought together, each store's gradient being the mean over its own.

Shapes: B photos, H height, W width, T shared trainable values.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from fedshelf.privacy.audit.step_update import named
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.cross_entropy import cross_entropy

STEPS = 2000
_MILESTONES = (3 / 8, 5 / 8, 7 / 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class InversionSettings:
    """Settings of the attack.

    Attributes:
        steps: iterations (T).
        total_variation: weight of smoothness (alpha). Of the mean differences between neighboring pixels.
        lr: step width at first, in units of normalized pixels.
        seed: seed of line 1.
    """

    steps: int = STEPS
    total_variation: float = 3e-3
    lr: float = 0.1
    seed: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Inverted:
    """What the attack found.

    Attributes:
        images: [B, 3, H, W]: the pictures, with values from 0 to 1.
        distance: cosine distance of their gradient from the observed one.
        seconds: duration.
    """

    images: Tensor
    distance: float
    seconds: float


def invert(
    bound: BoundModel, gradient: Tensor, labels_B: Tensor, *, size: int, settings: InversionSettings,
    num_stores: int = 1,
) -> Inverted:  # fmt: skip
    """Search for photos whose gradient has the direction of the observed one.

    Args:
        bound: the model, with the values that the observed step started from. Its statistics are restored.
        gradient: [T]: the observed gradient.
        labels_B: the labels of the photos.
        size: side of the photos in pixels.
        settings: settings of the attack.
        num_stores: stores whose mean was observed, with equally many photos each.

    Returns:
        The pictures.
    """
    started, before = time.perf_counter(), bound.params.changing.clone()
    wanted = {name: tensor for name, tensor in named(bound, gradient).items() if tensor.norm() > 0}
    parameters = dict(bound.module.named_parameters())
    norm = torch.sqrt(sum((tensor.square().sum() for tensor in wanted.values()), torch.zeros(())))
    generator = torch.Generator().manual_seed(settings.seed)
    low, high = pixel_range(bound)
    images = torch.randn((len(labels_B), 3, size, size), generator=generator).to(bound.compute.device)
    images.requires_grad_()
    adam = torch.optim.Adam([images], lr=settings.lr)
    schedule = torch.optim.lr_scheduler.MultiStepLR(adam, [int(settings.steps * part) for part in _MILESTONES], 0.1)
    parts = num_stores if bound.has_batch_norm else 1  # elsewhere, photos do not act on each other
    distance = torch.ones(())
    bound.train()
    for _ in range(settings.steps):
        loss = torch.zeros(())
        for some, labels in zip(images.chunk(parts), labels_B.chunk(parts), strict=True):
            smoothing = bound.settings.label_smoothing
            loss = loss + cross_entropy(bound.logits(some), labels, None, label_smoothing=smoothing) / parts
        found = torch.autograd.grad(loss, [parameters[name] for name in wanted], create_graph=True)
        inner = torch.stack([(mine * other).sum() for mine, other in zip(found, wanted.values(), strict=True)]).sum()
        own = torch.stack([mine.square().sum() for mine in found]).sum().sqrt()
        distance = 1 - inner / (own * norm + 1e-30)
        (images.grad,) = torch.autograd.grad(distance + settings.total_variation * total_variation(images), [images])
        images.grad.sign_()
        adam.step()
        schedule.step()
        with torch.no_grad():
            images.copy_(torch.maximum(torch.minimum(images, high), low))
    bound.params.changing.copy_(before)
    pictures = as_pictures(bound, images)
    return Inverted(images=pictures, distance=distance.item(), seconds=time.perf_counter() - started)


def total_variation(images_BCHW: Tensor) -> Tensor:
    """The mean absolute difference between neighboring pixels, down and across."""
    down = (images_BCHW[..., 1:, :] - images_BCHW[..., :-1, :]).abs().mean()
    return down + (images_BCHW[..., 1:] - images_BCHW[..., :-1]).abs().mean()


def pixel_range(bound: BoundModel) -> tuple[Tensor, Tensor]:
    """Black and white [1, 3, 1, 1], normalized."""
    mean, std = (
        torch.tensor(values, device=bound.compute.device).view(1, 3, 1, 1)
        for values in (bound.normalization.mean, bound.normalization.std)
    )
    return -mean / std, (1 - mean) / std


def as_pictures(bound: BoundModel, images_BCHW: Tensor) -> Tensor:
    """Undo the normalization: values from 0 to 1, on the CPU. A relit view beyond black or white is cut off."""
    low, high = pixel_range(bound)
    return ((images_BCHW.detach() - low) / (high - low)).clamp(0, 1).cpu()
