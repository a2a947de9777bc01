"""The forward pass through torch.compile, if it is requested or measured to be faster.

On CPUs it was slower in every measurement (docs/explanation/simulation-engines.md) and takes minutes to start, so there
it must be requested.
"""

import textwrap
from dataclasses import dataclass, replace

import torch

from fedshelf.core.choices import CompileChoice
from fedshelf.core.errors import UsageError
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.loop import differentiate_one
from fedshelf.training.timing import noise_runs, seconds

MARGIN = 0.95  # smaller gains are within the noise of such a short measurement


@dataclass(frozen=True, kw_only=True, eq=False)
class Compiled:
    """The outcome of `choose_forward`.

    Attributes:
        bound: the model to train.
        compiled: whether its pass is compiled.
        reason: why, or why not.
    """

    bound: BoundModel
    compiled: bool
    reason: str


def choose_forward(
    bound: BoundModel, image_size: int, choice: CompileChoice, *, backend: str = "inductor"
) -> Compiled:  # fmt: skip
    """Compile the model's training pass according to `choice`. Values are unchanged.

    Args:
        bound: the model.
        image_size: side of the photos in pixels.
        choice: 'auto' times both passes on a GPU.
        backend: backend of torch.compile.

    Raises:
        UsageError: the choice is 'on' and the model cannot be compiled here.
    """
    device = bound.compute.device
    if choice == "off" or (choice == "auto" and device.type != "cuda"):
        reason = "switched off" if choice == "off" else f"not tried on {device.type}: it was slower wherever measured"
        return Compiled(bound=bound, compiled=False, reason=reason)
    before = bound.params.vector.clone()
    compiled = replace(bound, forward=torch.compile(bound.module, backend=backend))
    try:
        plain, fast = (_step_seconds(each, image_size) for each in (bound, compiled))
    except Exception as error:  # noqa: BLE001  the compiler's own failures, and those of the model's code in it
        reason = f"the model cannot be compiled here: {type(error).__name__}: {textwrap.shorten(str(error), 200)}"
        if choice == "on":
            raise UsageError(f"--compile on: {reason}") from None
        return Compiled(bound=bound, compiled=False, reason=reason)
    finally:
        bound.params.vector.copy_(before)  # the steps changed the statistics
    reason = f"{1000 * fast:.1f} ms a step compiled, {1000 * plain:.1f} ms plain"
    if choice == "on" or fast < MARGIN * plain:
        return Compiled(bound=compiled, compiled=True, reason=reason)
    return Compiled(bound=bound, compiled=False, reason=reason)


def _step_seconds(bound: BoundModel, image_size: int) -> float:
    local_runs = noise_runs([bound], image_size=image_size, batch_size=bound.settings.batch_size)
    differentiate_one(local_runs)  # compiles
    return seconds(lambda: differentiate_one(local_runs), bound.compute.device)
