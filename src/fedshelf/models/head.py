"""A model's head: the output layers, with one row of values per class."""

from typing import Any

from torch import nn

from fedshelf.core.errors import ModelError


def head_layers(module: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The output layers: what timm's models call their classifier, otherwise the last linear layer.

    Args:
        module: any model; layers are found by type.

    Returns:
        The layers by name: empty if the model has none, several if it averages several classifiers.
    """
    layers = {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear | nn.Conv2d)}
    get_classifier: Any = getattr(module, "get_classifier", None)
    if get_classifier is not None:
        found = get_classifier()
        classifiers = found if isinstance(found, tuple | list | nn.ModuleList) else [found]
        parts = {part for classifier in classifiers for part in classifier.modules()}
        return {name: layer for name, layer in layers.items() if layer in parts}
    last = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)][-1:]
    return {name: layers[name] for name in last}


def linear_head(module: nn.Module) -> tuple[str, nn.Linear]:
    """The single linear output layer, and its name.

    Raises:
        ModelError: the model has none, several, or one of another type.
    """
    layers = head_layers(module)
    name, layer = next(iter(layers.items()), ("", None))
    if len(layers) != 1 or not isinstance(layer, nn.Linear):
        found = ", ".join(f"{name} ({type(child).__name__})" for name, child in layers.items()) or "none"
        raise ModelError(f"a head on frozen features needs a model with one linear output layer; this one has {found}")
    return name, layer


def head_names(module: nn.Module) -> frozenset[str]:
    """Names of the head's tensors, as in the module's state dict."""
    return frozenset(
        f"{layer}.{name}" if layer else name
        for layer, child in head_layers(module).items()
        for name, _ in child.named_parameters(recurse=False)  # without a sales tower
    )
