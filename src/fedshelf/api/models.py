"""The model of a federation: a name, a function that makes a module, or a module."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import nn

from fedshelf.core.errors import UsageError
from fedshelf.models.own_model import call
from fedshelf.models.registry import problem_with_own

ModelArgument: TypeAlias = str | nn.Module | Callable[[int], nn.Module]


@dataclass(frozen=True, kw_only=True, eq=False)
class GivenModel:
    """Creates the module of a federation from what the user gave.

    Attributes:
        model: a function that takes the number of classes, or a module, which is copied.
        image_size: side of the photos in pixels, for a trial pass.
    """

    model: nn.Module | Callable[[int], nn.Module]
    image_size: int

    def __call__(self, num_classes: int) -> nn.Module:
        """Create the module.

        Raises:
            ModelError: the function fails, or its module cannot be trained.
        """
        return call(name_of(self.model), self._make, num_classes=num_classes, image_size=self.image_size, files={})

    def _make(self, num_classes: int) -> nn.Module:
        return copy.deepcopy(self.model).cpu() if isinstance(self.model, nn.Module) else self.model(num_classes)


def name_of(model: nn.Module | Callable[[int], nn.Module]) -> str:
    """Return the name of a given model in the run's configuration. It is not used to find the model.

    Raises:
        UsageError: `model` is something else.
    """
    if not callable(model):
        raise UsageError(
            f"model is a {type(model).__name__}: give a name, a function of the number of classes, or a module"
        )
    kind = type(model) if isinstance(model, nn.Module) else model
    name = f"{getattr(kind, '__module__', '')}:{getattr(kind, '__qualname__', '')}"
    return "__main__:model" if problem_with_own(name) else name
