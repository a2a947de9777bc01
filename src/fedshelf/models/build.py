"""From a name to a module."""

from dataclasses import dataclass

import torch
from torch import nn

from fedshelf.core.choices import NormName
from fedshelf.core.errors import ModelError
from fedshelf.models.resnet import resnet10


@dataclass(frozen=True, kw_only=True, slots=True)
class Normalization:
    """Per-channel mean and standard deviation of photos scaled to [0, 1]; ImageNet's unless a model says otherwise."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSettings:
    """What to build. `width` is for our own `resnet10` alone."""

    name: str
    num_classes: int
    image_size: int
    norm: NormName = "batch"
    width: int = 16
    pretrained: bool = False


def build(settings: ModelSettings, *, seed: int) -> nn.Module:
    """The module with fresh weights drawn from `seed`; the global generators are left as they were.

    Raises:
        ModelError: see `build_timm`; pretrained weights of our own models do not exist.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if settings.name == "resnet10":
            if settings.pretrained:
                raise ModelError("resnet10 is our own and has no pretrained weights; choose a timm model for that")
            return resnet10(settings.num_classes, width=settings.width, norm=settings.norm)
        from fedshelf.models.timm_models import build_timm

        problem = find_problem(settings.name)
        if problem is not None:
            raise ModelError(problem)
        return build_timm(
            settings.name, num_classes=settings.num_classes, image_size=settings.image_size, norm=settings.norm,
            pretrained=settings.pretrained,
        )  # fmt: skip


def find_problem(name: str) -> str | None:
    """Why there is no model of that name, with near ones; None where there is."""
    if name == "resnet10":
        return None
    from fedshelf.models.timm_models import near_names

    near = near_names(name)
    return f"there is no model {name!r}; near it: {', '.join(near)} (and our own resnet10)" if near else None


def normalization_of(module: nn.Module) -> Normalization:
    """What the model's photos are normalized with: its own published values where it has some."""
    published = getattr(module, "pretrained_cfg", None) or {}
    if "mean" in published and "std" in published:
        return Normalization(mean=tuple(published["mean"]), std=tuple(published["std"]))
    return Normalization()
