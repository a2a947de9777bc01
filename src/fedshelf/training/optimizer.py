"""Local optimizers on flat vectors, and the learning rate over rounds.

One call updates one client, or many that train side by side. The optimizers call torch's kernels directly: for a small
model, the optimizer classes cost more than the kernels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from fedshelf.core.choices import Schedule
from fedshelf.core.errors import ModelError
from fedshelf.core.params import Params
from fedshelf.training.phases import Moves
from fedshelf.training.settings import TrainingSettings

_FUSED_DEVICES = ("cpu", "cuda")


@dataclass(kw_only=True, eq=False)
class OptimizerState:
    """The optimizer's state for one client.

    It has one entry per region (shared trainable values, personal values, or both), starts fresh each round and never
    leaves the client.

    Attributes:
        values: the values to update.
        factors: their learning rates, as multiples of the round's.
        gradients: their gradients.
        moments: SGD's momentum (None before the first step) or AdamW's first moment.
        squares: AdamW's second moment.
        steps: AdamW's step counters.
    """

    values: list[Tensor]
    factors: list[float]
    gradients: list[Tensor]
    moments: list[Tensor | None]
    squares: list[Tensor]
    steps: list[Tensor]


def start(
    params: Params, gradients: Tensor, settings: TrainingSettings, moves: Moves = Moves.ALL, head: slice | None = None
) -> OptimizerState:  # fmt: skip
    """Create a fresh optimizer.

    Args:
        params: its trainable values are updated.
        gradients: gradients [P], read at each step.
        settings: settings of local training.
        moves: the values to update.
        head: where the output layer lies; required if it has a learning rate of its own, or is moved alone.

    Raises:
        ModelError: the output layer is not known.
    """
    layout = params.layout
    factors = {"head": settings.head_lr_factor, "personal": 1.0}
    regions = {"all": slice(0, layout.num_trainable)} if moves is not Moves.PERSONAL else {}
    if regions and (moves is Moves.HEAD or settings.has_head_lr):
        if head is None:
            raise ModelError("the output layer cannot be trained apart: stores do not share a single linear one")
        regions = {"before": slice(0, head.start), "head": head, "after": slice(head.stop, layout.num_trainable)}
        regions = {
            name: region
            for name, region in regions.items()
            if region.stop > region.start and (name == "head" or moves is not Moves.HEAD)
        }
    if layout.num_personal_trainable and moves in (Moves.ALL, Moves.PERSONAL):
        regions["personal"] = slice(layout.num_shared, layout.num_shared + layout.num_personal_trainable)
    values = [params.vector[region] for region in regions.values()]
    remembers = settings.optimizer == "adamw"
    return OptimizerState(
        values=values,
        factors=[factors.get(name, settings.backbone_lr_factor) for name in regions],
        gradients=[gradients[region] for region in regions.values()],
        moments=[torch.zeros_like(value) if remembers else None for value in values],
        squares=[torch.zeros_like(value) for value in values] if remembers else [],
        steps=[_step_counter(value) for value in values] if remembers else [],
    )


@torch.no_grad()
def step(states: Sequence[OptimizerState], settings: TrainingSettings, client_lr: float) -> None:
    """Take one optimizer step for all clients in `states`, which must have taken equally many before.

    Args:
        states: updated in place.
        settings: settings of local training.
        client_lr: learning rate.
    """
    factors = {factor for state in states for factor in state.factors}
    if len(factors) > 1:
        for factor in sorted(factors):
            _step_part(states, settings, client_lr, factor)
        return
    client_lr *= next(iter(factors))
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
    made = iter(moments)  # created in this list by the first step
    for state in states:
        state.moments = [next(made) for _ in state.values]


def _step_part(
    states: Sequence[OptimizerState], settings: TrainingSettings, client_lr: float, factor: float
) -> None:  # fmt: skip
    """Step the values of one learning rate."""
    parts, places = [], []
    for state in states:
        chosen = [i for i, own in enumerate(state.factors) if own == factor]
        parts.append(
            OptimizerState(
                values=[state.values[i] for i in chosen], factors=[factor] * len(chosen),
                gradients=[state.gradients[i] for i in chosen], moments=[state.moments[i] for i in chosen],
                squares=[state.squares[i] for i in chosen] if state.squares else [],
                steps=[state.steps[i] for i in chosen] if state.steps else [],
            )
        )  # fmt: skip
        places.append(chosen)
    step(parts, settings, client_lr)
    for state, part, chosen in zip(states, parts, places, strict=True):
        for i, moment in zip(chosen, part.moments, strict=True):
            state.moments[i] = moment  # SGD's first step creates them


def client_lr(round: int, *, base: float, schedule: Schedule, warmup_rounds: int, num_rounds: int) -> float:
    """The learning rate of a round: linear warm-up, then constant or a half cosine.

    The cosine starts at round 1 and would reach zero one round after the last. Rounds beyond `num_rounds` (of an
    extended run) keep the last round's rate.

    Args:
        round: the round, from 1.
        base: the peak rate.
        schedule: constant or cosine.
        warmup_rounds: rounds of linear warm-up.
        num_rounds: rounds of the run.

    Source: Loshchilov & Hutter 2017, "SGDR", eq. 5, without restarts; per round, since that is the server's clock.
    """
    step = min(round, num_rounds)
    warmup = min(1.0, step / warmup_rounds) if warmup_rounds else 1.0
    if schedule == "constant":
        return base * warmup
    return base * warmup * 0.5 * (1 + math.cos(math.pi * (step - 1) / num_rounds))


def _step_counter(value: Tensor) -> Tensor:
    device = value.device if value.device.type in _FUSED_DEVICES else torch.device("cpu")
    return torch.zeros((), dtype=torch.float32, device=device)
