"""Checks whether the gradient of each photo can be computed in a model, on noise."""

import textwrap

from torch import Tensor

from fedshelf.core.params import Params
from fedshelf.privacy.dp_sgd import sum_clipped
from fedshelf.training import loop
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.timing import noise_runs

TOLERANCE = 1e-3  # of the gradient's norm; rounding stays far below, a wrong formula does not
COARSE_TOLERANCE = 5e-2  # the same where the pass runs in bfloat16
MOST_NAMED = 3  # tensors of which a problem says by how much their gradient is off
_ANY_NORM = 1e9


def find_problem(bound: BoundModel, image_size: int) -> str | None:
    """Why the gradients of single photos cannot be computed; None if their sum is right.

    Args:
        bound: the model; its values are left unchanged.
        image_size: side of the photos in pixels.
    """
    before = bound.params.changing.clone()
    (local_run,) = noise_runs([bound], image_size=image_size, batch_size=2)
    entered: list[str] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, __, name=name: entered.append(name))
        for name, layer in bound.trained.named_modules()
        if not [*layer.children()]
    ]
    try:
        loop.differentiate_one([local_run])
        right = bound.gradients.clone()
        bound.gradients.zero_()
        entered.clear()
        sum_clipped(local_run, _ANY_NORM, "flat")
    except Exception as error:  # noqa: BLE001  whatever a model's own code raises under vmap
        where = f" in its layer {entered[-1]!r}" if entered else ""
        reason = textwrap.shorten(str(error), 200)
        return f"the gradient of a single photo cannot be computed{where}: {type(error).__name__}: {reason}"
    finally:
        for hook in hooks:
            hook.remove()
        bound.params.changing.copy_(before)
    wrong, norm = bound.gradients / 2 - right, right.norm().clamp(min=1e-12)
    off = float(wrong.norm() / norm)
    bound.gradients.zero_()
    if off < (COARSE_TOLERANCE if bound.compute.autocast else TOLERANCE):
        return None
    return (
        f"the gradients of single photos do not add up to that of a batch (they are off by {off:.1e}, most in "
        f"{_largest(bound, wrong / norm)}): a layer mixes the photos of a batch, or draws random values"
    )


def _largest(bound: BoundModel, parts: Tensor) -> str:
    """The tensors with the largest parts of a gradient [M], and the norms of these parts."""
    views = Params(parts, bound.params.layout).views(frozen=False)
    norms = sorted(((float(view.norm()), name) for name, view in views.items()), reverse=True)
    return ", ".join(f"{name!r}: {norm:.1e}" for norm, name in norms[:MOST_NAMED] if norm >= norms[0][0] / 10)
