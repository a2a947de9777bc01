"""One module bound to one vector: what a process trains on, whichever client it plays."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedshelf.core.choices import OptimizerName
from fedshelf.core.params import Params, bind, bind_gradients
from fedshelf.data.augmentation import Augmentation
from fedshelf.models.build import Normalization, normalization_of
from fedshelf.training.device import Compute


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSettings:
    """Local training. The optimizer starts fresh each round and never leaves the client.

    `gradient_clip` bounds the norm of each step's loss gradient (0: no bound); `augmentation` is None to train on
    photos as they are.
    """

    optimizer: OptimizerName = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    gradient_clip: float = 5.0
    batch_size: int = 16
    local_epochs: int = 2
    augmentation: Augmentation | None = Augmentation()  # noqa: RUF009  frozen


@dataclass(frozen=True, kw_only=True, eq=False)
class Workbench:
    """A module whose tensors are views of `params.vector` [P] and whose gradients are views of `gradients` [P]."""

    module: nn.Module
    params: Params
    gradients: Tensor
    compute: Compute
    normalization: Normalization
    settings: TrainingSettings

    @classmethod
    def of(cls, module: nn.Module, *, compute: Compute, settings: TrainingSettings) -> "Workbench":
        """Take the module over: it is moved to the device and its tensors are rebound."""
        normalization = normalization_of(module)
        params = bind(module.to(compute.device))
        return cls(
            module=module, params=params, gradients=bind_gradients(module, params), compute=compute,
            normalization=normalization, settings=settings,
        )  # fmt: skip

    def load(self, shared: Tensor) -> None:
        """Make `shared` [S] the module's shared tensors."""
        self.params.shared.copy_(shared)

    def logits(self, images_BCHW: Tensor) -> Tensor:
        """[B, K] in float32, computed in bfloat16 where that pays."""
        if not self.compute.autocast:
            output: Tensor = self.module(images_BCHW)
            return output
        with torch.autocast(self.compute.device.type, dtype=torch.bfloat16):
            output = self.module(images_BCHW)
        return output.float()

    def make_optimizer(self, client_lr: float) -> torch.optim.Optimizer:
        """A fresh optimizer over the trainable values: at most two flat parameters (shared, personal)."""
        layout = self.params.layout
        regions = [slice(0, layout.num_trainable)]
        if layout.num_personal_trainable:
            regions.append(slice(layout.num_shared, layout.num_shared + layout.num_personal_trainable))
        flat = []
        for region in regions:
            parameter = nn.Parameter(self.params.vector[region])
            parameter.grad = self.gradients[region]
            flat.append(parameter)
        decay = self.settings.weight_decay
        fused = self.compute.device.type in ("cpu", "cuda")
        if self.settings.optimizer == "adamw":
            return torch.optim.AdamW(flat, lr=client_lr, weight_decay=decay, fused=fused)
        momentum = self.settings.momentum
        return torch.optim.SGD(
            flat, lr=client_lr, momentum=momentum, nesterov=momentum > 0, weight_decay=decay, fused=fused
        )  # fmt: skip


GradientHook = Callable[[Tensor, Tensor], None]
"""Called each step with views of the shared trainable gradient and values, both [T]; adds to the gradient in place."""
