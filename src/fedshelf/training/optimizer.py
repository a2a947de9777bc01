"""The local optimizers on flat vectors: one call moves the values of one client, or of many that train side by side.

These are torch's own kernels without the classes around them, which cost a small model's step more than its kernel.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from fedshelf.core.params import Params
from fedshelf.training.phases import Moves
from fedshelf.training.settings import TrainingSettings

_FUSED_DEVICES = ("cpu", "cuda")


@dataclass(kw_only=True, eq=False)
class OptimizerState:
    """What an optimizer moves and remembers of one client, one entry per region (shared trainable values; personal
    ones, if there are any; or one of the two). It starts fresh each round and never leaves the client.

    `moments` are SGD's momentum (None before the first step) or AdamW's first moment; `squares` and `steps` are
    AdamW's alone.
    """

    values: list[Tensor]
    gradients: list[Tensor]
    moments: list[Tensor | None]
    squares: list[Tensor]
    steps: list[Tensor]


def start(
    params: Params, gradients: Tensor, settings: TrainingSettings, moves: Moves = Moves.ALL
) -> OptimizerState:  # fmt: skip
    """A fresh optimizer over the trainable values of `params`; `gradients` [P] are read at each step."""
    layout = params.layout
    regions = [slice(0, layout.num_trainable)] if moves is not Moves.PERSONAL else []
    if layout.num_personal_trainable and moves is not Moves.SHARED:
        regions.append(slice(layout.num_shared, layout.num_shared + layout.num_personal_trainable))
    values = [params.vector[region] for region in regions]
    remembers = settings.optimizer == "adamw"
    return OptimizerState(
        values=values,
        gradients=[gradients[region] for region in regions],
        moments=[torch.zeros_like(value) if remembers else None for value in values],
        squares=[torch.zeros_like(value) for value in values] if remembers else [],
        steps=[_step_counter(value) for value in values] if remembers else [],
    )


@torch.no_grad()
def step(states: Sequence[OptimizerState], settings: TrainingSettings, client_lr: float) -> None:
    """One step of every client in `states`; all of them have taken equally many before."""
    values = [value for state in states for value in state.values]
    gradients = [gradient for state in states for gradient in state.gradients]
    moments = [moment for state in states for moment in state.moments]
    fused = values[0].device.type in _FUSED_DEVICES
    if settings.optimizer == "adamw":
        adamw(
            values, gradients, [moment for moment in moments if moment is not None],
            [square for state in states for square in state.squares], [], [s for state in states for s in state.steps],
            fused=fused, amsgrad=False, beta1=0.9, beta2=0.999, lr=client_lr, weight_decay=settings.weight_decay,
            eps=1e-8, maximize=False,
        )  # fmt: skip
        return
    momentum = settings.momentum
    sgd(
        values, gradients, moments, fused=fused, weight_decay=settings.weight_decay, momentum=momentum, lr=client_lr,
        dampening=0.0, nesterov=momentum > 0, maximize=False,
    )  # fmt: skip
    made = iter(moments)  # the first step made them, in this list
    for state in states:
        state.moments = [next(made) for _ in state.values]


def _step_counter(value: Tensor) -> Tensor:
    device = value.device if value.device.type in _FUSED_DEVICES else torch.device("cpu")
    return torch.zeros((), dtype=torch.float32, device=device)
