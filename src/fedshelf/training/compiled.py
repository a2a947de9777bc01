"""The forward pass through torch.compile, on request.

On CPUs it was slower in every measurement (docs/explanation/simulation-engines.md) and takes minutes to start.
"""

import textwrap
from dataclasses import replace

import torch

from fedshelf.core.errors import UsageError
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.loop import differentiate_one
from fedshelf.training.timing import noise_runs


def compile_forward(bound: BoundModel, image_size: int, *, backend: str = "inductor") -> BoundModel:
    """Compile the model's training pass. Values are unchanged.

    Args:
        bound: the model.
        image_size: side of the photos in pixels.
        backend: backend of torch.compile.

    Returns:
        The model with the compiled pass.

    Raises:
        UsageError: the model cannot be compiled here.
    """
    before = bound.params.changing.clone()
    compiled = replace(bound, forward=torch.compile(bound.trained, backend=backend))
    try:
        differentiate_one(noise_runs([compiled], image_size=image_size, batch_size=bound.settings.batch_size))
    except Exception as error:  # noqa: BLE001  the compiler's own failures, and those of the model's code in it
        reason = f"{type(error).__name__}: {textwrap.shorten(str(error), 200)}"
        raise UsageError(f"--compile on: the model cannot be compiled here: {reason}") from None
    finally:
        bound.params.changing.copy_(before)  # the step changed the statistics
    return compiled
