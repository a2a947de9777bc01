"""Building modules by name."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy

from fedshelf.core.errors import ModelError, PolicyError
from fedshelf.core.settings import load
from fedshelf.core.text import did_you_mean
from fedshelf.models.registry import MODELS, is_own, problem_with_own
from fedshelf.models.settings import ModelSettings, Normalization


def build(settings: ModelSettings, *, seed: int) -> nn.Module:
    """Build the module with new weights drawn from `seed`, without changing the global generators.

    Args:
        settings: the model.
        seed: seed of the weights.

    Raises:
        ModelError: see `find_problem`, `build_timm` and `build_own`.
    """
    problem = find_problem(settings.name, pretrained=settings.pretrained)
    if problem is not None:
        raise ModelError(problem)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if settings.name in MODELS:
            module: nn.Module = load(MODELS[settings.name])(settings)
            return module
        if is_own(settings.name):
            from fedshelf.models.own_model import build_own

            module = build_own(
                settings.name, digest=settings.digest, num_classes=settings.num_classes, image_size=settings.image_size
            )
            if settings.norm == "batch":
                return module
            from fedshelf.models.timm_models import to_group_norm

            return to_group_norm(module)
        from fedshelf.models.timm_models import build_timm

        return build_timm(
            settings.name, num_classes=settings.num_classes, image_size=settings.image_size, norm=settings.norm,
            pretrained=settings.pretrained,
        )  # fmt: skip


@contextmanager
def at_most(num_parameters: int) -> Iterator[None]:
    """Within this context, building a module of more parameters fails before their memory is used.

    Args:
        num_parameters: the maximum.

    Raises:
        PolicyError: the module has more.
    """
    count = 0

    def add(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        count += 0 if parameter is None or is_lazy(parameter) else parameter.numel()
        if count > num_parameters:
            raise PolicyError(f"the model has more than max-parameters = {num_parameters:,}")

    hook = register_module_parameter_registration_hook(add)
    try:
        yield
    finally:
        hook.remove()


def find_problem(name: str, *, pretrained: bool = False) -> str | None:
    """The error for an unknown model name, with the nearest known one, or for a model without pretrained weights.

    Args:
        name: name of the model.
        pretrained: whether pretrained weights are requested.

    Returns:
        The error; None if there is such a model.
    """
    if is_own(name) and not pretrained:
        return problem_with_own(name)
    if is_own(name):
        return f"--pretrained: {name} is a function of your own. Give weights with --init FILE"
    if name in MODELS:
        return (
            f"--pretrained: {name} has no pretrained weights. Choose a timm model, such as tf_efficientnet_lite0"
            if pretrained
            else None
        )
    from fedshelf.models.timm_models import model_names

    known = model_names()
    hint = did_you_mean(name, [*MODELS, *known]) or (
        f": use {', '.join(MODELS)}, a model of timm such as resnet18 or mobilenetv3_small_100, or MODULE:FUNCTION"
    )
    if name not in known:
        return f"unknown model {name!r}{hint}"
    if pretrained and name not in model_names(pretrained=True):
        return f"--pretrained: timm has no weights of {name}. Choose another model, or give weights with --init FILE"
    return None


def normalization_of(module: nn.Module) -> Normalization:
    """The normalization of the model's photos: its published values, if there are any."""
    published = getattr(module, "pretrained_cfg", None) or {}
    if "mean" in published and "std" in published:
        return Normalization(mean=tuple(published["mean"]), std=tuple(published["std"]))
    return Normalization()
