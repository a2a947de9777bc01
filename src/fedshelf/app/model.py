"""Builds a run's model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedshelf.app.components import personalization_of, training_of
from fedshelf.config.schema import RunConfig
from fedshelf.core.choices import DeviceName
from fedshelf.core.rng import Rng
from fedshelf.data.catalogue import Catalogue
from fedshelf.models.adapters import add_adapters
from fedshelf.models.build import build
from fedshelf.models.initial_weights import InitialWeights, load_initial_weights
from fedshelf.models.sales import add_sales
from fedshelf.models.settings import ModelSettings
from fedshelf.models.trainable import frozen_names
from fedshelf.storage.model_files import WEIGHTS, load_model_files
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.device import choose

ModuleFactory = Callable[[int], nn.Module]
"""Creates a module for a number of classes: the caller's own model instead of a named one."""


def model_settings(config: RunConfig, num_classes: int) -> ModelSettings:
    """Return the settings of the configured model for `num_classes`.

    Pretrained weights concern only the server: clients receive them, and the clients' configuration does not mention
    them.
    """
    return ModelSettings(
        name=config.model, num_classes=num_classes, image_size=config.image_size, norm=config.norm,
        width=config.width, pretrained=config.pretrained, digest=config.model_digest,
    )  # fmt: skip


def module_of(config: RunConfig, num_classes: int, make_module: ModuleFactory | None = None) -> nn.Module:
    """Create the run's model with weights drawn from the run's seed, or pretrained ones, and its sales tower, if any.

    Args:
        config: names the model.
        num_classes: number of outputs.
        make_module: creates the caller's own model instead.

    Returns:
        The module, on the CPU.

    Raises:
        ModelError: see `models.build.build`.
    """
    seed = Rng(config.seed).fork(purpose="init").seed
    if make_module is None:
        module = build(model_settings(config, num_classes), seed=seed)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = make_module(num_classes)
    if config.sales:
        tower_seed = Rng(config.seed).fork(purpose="sales").seed
        add_sales(module, forecast_weight=config.forecast_weight, seed=tower_seed)
    return module


def trainable_module_of(
    config: RunConfig, num_classes: int, make_module: ModuleFactory | None = None
) -> tuple[nn.Module, frozenset[str]]:  # fmt: skip
    """Create the module of `module_of`, with adapters if these are trained.

    Args:
        config: names the model, and what is trained.
        num_classes: number of outputs.
        make_module: creates the caller's own model instead.

    Returns:
        The module, and the names of its tensors that never change.

    Raises:
        ModelError: see `models.build.build`; or the model lacks the layers that are to be trained.
    """
    module = module_of(config, num_classes, make_module)
    if config.train == "adapter":
        seed = Rng(config.seed).fork(purpose="adapter").seed
        add_adapters(module, rank=config.adapter_rank, alpha=config.adapter_alpha, seed=seed)
    return module, frozen_names(module, config.train, freeze_norm=config.freeze_norm)


def load_initial(bound: BoundModel, folder: Path, catalogue: Catalogue) -> dict[str, Any]:
    """Load the model that a run started from, whose catalogue may have had fewer classes; the rows of others stay.

    Args:
        bound: the model for the catalogue of today.
        folder: the saved model.
        catalogue: that catalogue.

    Returns:
        The card of the saved model.

    Raises:
        ModelError: the files cannot be read, or do not fit.
    """
    tensors, labels, card = load_model_files(folder)
    if tuple(labels) == catalogue.names:
        bound.module.load_state_dict(tensors)
    else:
        weights = InitialWeights(path=folder / WEIGHTS, tensors=tensors, labels=tuple(labels), is_published=True)
        load_initial_weights(bound.module, weights, catalogue.names)
    return card


def bound_model_of(
    config: RunConfig, catalogue: Catalogue, *, device: DeviceName, make_module: ModuleFactory | None = None
) -> BoundModel:  # fmt: skip
    """Create a bound model from `trainable_module_of`.

    Args:
        config: the run's configuration.
        catalogue: the classes.
        device: the device to compute on.
        make_module: creates the caller's own model instead.

    Returns:
        The bound model.

    Raises:
        ModelError: see `trainable_module_of`.
    """
    compute = choose(device, threads=config.threads)
    module, frozen = trainable_module_of(config, len(catalogue), make_module)
    return BoundModel.of(
        module,
        compute=compute,
        settings=training_of(config),
        personal_names=personalization_of(config).personal_names(module),
        frozen_names=frozen,
        on_features=config.train in ("head", "sales"),
    )
