"""A module bound to one flat vector. A process trains all of its clients on it."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedshelf.core.params import Params, bind, bind_gradients
from fedshelf.models.build import Normalization, normalization_of
from fedshelf.models.convolution_fault import avoid_convolution_fault
from fedshelf.training.device import Compute
from fedshelf.training.settings import TrainingSettings

__all__ = ["GradientHook", "TrainingSettings", "BoundModel"]


@dataclass(frozen=True, kw_only=True, eq=False)
class BoundModel:
    """A module whose tensors and gradients are views of flat vectors.

    Attributes:
        module: the module.
        params: its tensors [P].
        gradients: its gradients [P].
        compute: the device and precision.
        normalization: normalization of photos.
        settings: settings of local training.
        initial_personal: initial values [P - S] of the personal tensors, at every client.
        forward: another form of the training pass, such as a compiled one; None: the module itself.
    """

    module: nn.Module
    params: Params
    gradients: Tensor
    compute: Compute
    normalization: Normalization
    settings: TrainingSettings
    initial_personal: Tensor
    forward: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def of(
        cls, module: nn.Module, *, compute: Compute, settings: TrainingSettings,
        personal_names: Collection[str] = frozenset(),
    ) -> "BoundModel":  # fmt: skip
        """Bind a module, in place: it is moved to the device and its tensors are rebound.

        Args:
            module: the module.
            compute: the device and precision.
            settings: settings of local training.
            personal_names: tensors that stay at the client.
        """
        normalization = normalization_of(module)
        avoid_convolution_fault(module)
        params = bind(module.to(compute.device), is_personal=lambda name: name in personal_names)
        return cls(
            module=module, params=params, gradients=bind_gradients(module, params), compute=compute,
            normalization=normalization, settings=settings, initial_personal=params.personal.clone(),
        )  # fmt: skip

    @cached_property
    def has_batch_norm(self) -> bool:
        """Whether the module cannot train on a batch of one photo."""
        return any(isinstance(child, _BatchNorm) for child in self.module.modules())

    def load(self, shared: Tensor) -> None:
        """Copy `shared` [S] into the module's shared tensors."""
        self.params.shared.copy_(shared)

    def logits(self, images_BCHW: Tensor, *, forward: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Compute logits [B, K] in float32; the pass runs in bfloat16 where that is faster.

        Args:
            images_BCHW: normalized photos.
            forward: the pass to use instead of the module.
        """
        passes = (forward, self.forward if self.module.training else None, self.module)
        compute = next(each for each in passes if each is not None)  # the truth of a compiled module is not defined
        if not self.compute.autocast:
            output: Tensor = compute(images_BCHW)
            return output
        with torch.autocast(self.compute.device.type, dtype=torch.bfloat16):
            output = compute(images_BCHW)
        return output.float()


GradientHook = Callable[[Tensor, Tensor], None]
"""Called each step with the shared trainable gradient and values, both [T]; adds to the gradient in place."""
