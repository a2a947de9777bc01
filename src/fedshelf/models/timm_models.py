"""timm, imported so that it also works with a CPU build of torch without torchvision's compiled operators."""

import errno
import importlib
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fedshelf.core.choices import NormName
from fedshelf.core.errors import ModelError, PolicyError
from fedshelf.core.system_errors import reason
from fedshelf.models.hub import asking_hub
from fedshelf.models.resnet import num_groups
from fedshelf.models.weights_packages import find_weights, how_to_get, load_weights, use_published_normalization

_DISK_FULL = frozenset((errno.ENOSPC, errno.EDQUOT))
_TORCHVISION_OPS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_schemas: list[torch.library.Library] = []  # definitions live as long as their library object


def import_timm() -> ModuleType:
    """Import timm.

    A torchvision built for CUDA fails to import with a CPU torch, because two operator schemas are missing (which are
    not used here). They are defined only in that case.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for name, schema in _TORCHVISION_OPS.items():
            library.define(name + schema)
        _schemas.append(library)
    return importlib.import_module("timm")


def build_timm(name: str, *, num_classes: int, image_size: int, norm: NormName, pretrained: bool) -> nn.Module:
    """Build the timm model `name` with a head of `num_classes`.

    Args:
        name: name of the model.
        num_classes: number of outputs.
        image_size: side of the photos in pixels.
        norm: kind of normalization layers.
        pretrained: whether to load pretrained weights: those of an installed package, otherwise of timm's hub.

    Raises:
        ModelError: the model does not support the image size, or pretrained weights cannot be had.
    """
    timm = import_timm()
    installed = find_weights(name) if pretrained else None
    arguments: dict[str, Any] = {"num_classes": num_classes, "pretrained": pretrained and installed is None}
    problem = ""
    try:
        with asking_hub() if arguments["pretrained"] else nullcontext("") as problem:
            try:
                module: nn.Module = timm.create_model(name, img_size=image_size, **arguments)
            except TypeError:  # convolutional models take any size and lack this argument
                module = timm.create_model(name, **arguments)
        use_published_normalization(module, name)
        if installed is not None:
            load_weights(module, name, installed)
        with torch.inference_mode():  # some models only fail here on an unsupported size
            module.eval()(torch.zeros(1, 3, image_size, image_size))
        module.train()
        timms: Any = module
        if (
            pretrained and num_classes == timms.pretrained_cfg["num_classes"]
        ):  # the same number of classes, but other ones
            timms.reset_classifier(num_classes)
    except (ModelError, PolicyError):
        raise
    except Exception as error:
        causes = [error]
        while cause := causes[-1].__cause__ or causes[-1].__context__:
            causes.append(cause)  # type: ignore[arg-type]
        of_system = [cause for cause in causes if isinstance(cause, OSError)]
        if not of_system:  # timm explains the error, such as a missing package
            raise ModelError(f"model {name!r} at {image_size} px could not be built: {error}") from error
        local = next((cause for cause in of_system if cause.filename or cause.errno in _DISK_FULL), None)
        if local is not None:
            raise ModelError(
                f"pretrained weights of {name!r} could not be saved: {reason(local)}. Free some space on that disk, or "
                "set the environment variable HF_HOME to a folder that can be written to"
            ) from error
        why = problem or reason(of_system[-1]).splitlines()[0].rstrip(".")
        raise ModelError(f"pretrained weights of {name!r} could not be fetched: {why}. {how_to_get(name)}") from error
    return to_group_norm(module) if norm == "group" else module


def model_names(*, pretrained: bool = False) -> list[str]:
    """Names of all timm models, or of those with pretrained weights."""
    timm = import_timm()
    names: list[str] = timm.list_models()
    return list(filter(timm.is_model_pretrained, names)) if pretrained else names


def to_group_norm(module: nn.Module) -> nn.Module:
    """Replace every batch normalization by group normalization of the same width, keeping its activation."""
    import_timm()
    from timm.layers import BatchNormAct2d, GroupNormAct

    for name, child in module.named_children():
        replacement: nn.Module | None = None
        if isinstance(child, BatchNormAct2d):
            replacement = GroupNormAct(child.num_features, num_groups=num_groups(child.num_features))
            replacement.drop, replacement.act = child.drop, child.act
        elif isinstance(child, nn.modules.batchnorm._BatchNorm):
            replacement = nn.GroupNorm(num_groups(child.num_features), child.num_features)
        if replacement is None:
            to_group_norm(child)
        else:
            setattr(module, name, replacement)
    return module
