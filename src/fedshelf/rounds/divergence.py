"""Whether a round has destroyed the model: checked before the round is checkpointed, so that it can be rolled back.

Uploads are finite, but their mean may not be, and few stores have no cohort that bounds an upload's norm. A model is
taken as destroyed if

* a value of it or of the server optimizer is not finite,
* its step is out of proportion to the model (`MAX_STEP` times the norm of each part), or
* it answers at random with great confidence: the loss of the median store, or of the server's test photos, is above
  `MAX_LOSS`. The median store, so that one store cannot undo a round by its claim.

Bounds are far above what honest training with any sensible settings reaches.

Shapes: S shared values.
"""

import math
from collections.abc import Iterable
from statistics import median_low

from torch import Tensor

from fedshelf.algorithms.reduce import quick_norm
from fedshelf.core.messages import STATISTICS, TRAINABLE
from fedshelf.core.state import ModelState
from fedshelf.rounds.validation import first_not_finite

MAX_STEP = {TRAINABLE: 100.0, STATISTICS: 1e6}  # statistics have the scale of activations
MAX_LOSS = 1000.0  # nats; guessing among a million products costs 14


def problem_with_step(before: Tensor, model: ModelState, *, num_trainable: int, is_solution: bool = False) -> str:
    """Why the step from `before` [S] to `model` has destroyed the model; empty if it has not.

    Args:
        before: the model before the round.
        model: the model after it.
        num_trainable: T of the layout.
        is_solution: whether the new model is computed anew, and may be far from the one before.
    """
    parts = ((TRAINABLE, slice(num_trainable)), (STATISTICS, slice(num_trainable, None)))
    steps = {part: quick_norm(model.params[values], before[values]) for part, values in parts}
    # Of a finite step, each value is finite, which saves a pass over the model.
    unknown = {} if all(map(math.isfinite, steps.values())) else {"model": model.params}
    for name, vector in {**unknown, **model.optimizer}.items():
        bad = first_not_finite(vector)
        if bad is not None:
            return f"the new {name} holds {vector[bad].item()}"
    for part, values in parts:
        step, most = steps[part], MAX_STEP[part]
        if not is_solution and step > most and step > most * (size := quick_norm(before[values])):
            return f"the {part} values would move by {step:.3g}, and their norm is {size:.3g}"
    return ""


def problem_with_loss(stores: Iterable[float], central: float | None) -> str:
    """Why the losses show a destroyed model; empty if they do not.

    Args:
        stores: mean loss of each store that evaluated it.
        central: mean loss on the server's test photos; None if it is not tested.
    """
    losses = [loss if math.isfinite(loss) else math.inf for loss in stores]
    found = {"of the median store": median_low(losses) if losses else None, "on the server's test photos": central}
    for where, loss in found.items():
        if loss is not None and not loss <= MAX_LOSS:
            return f"the loss {where} is {loss:.3g}"
    return ""
