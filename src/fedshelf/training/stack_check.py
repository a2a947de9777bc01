"""Checks whether a model's clients can be computed together, and whether that is faster. Works on copies."""

import textwrap
from dataclasses import dataclass

from torch.nn.modules.batchnorm import _BatchNorm

from fedshelf.training import loop
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.stack import Stack, default_count
from fedshelf.training.timing import LONG_STEP, noise_runs, seconds

TOLERANCE = 1e-3  # of the gradient's norm; rounding stays far below, a wrong formula does not
COARSE_TOLERANCE = 5e-2  # the same where the pass runs in bfloat16
MARGIN = 0.9  # smaller gains do not justify results that are only equal up to rounding
MEASURED_CHUNK = 8  # larger chunks gain slightly more, and take that much longer to measure


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Measured seconds per client and step.

    Attributes:
        alone: for a single client.
        together: for a chunk of clients; None if not measured.
        chunk: clients in the chunk.
        reason: why the chunk was not measured.
    """

    alone: float
    together: float | None
    chunk: int
    reason: str = ""

    @property
    def is_faster(self) -> bool:
        """Whether a process is clearly faster with its clients computed together."""
        return self.together is not None and self.together < MARGIN * self.alone


def find_problem(bound: BoundModel, image_size: int) -> str | None:
    """Why clients of this model cannot be computed together; None if their gradients are correct."""
    for child in bound.module.modules():
        if isinstance(child, _BatchNorm) and child.track_running_stats and child.momentum is None:
            return "batch normalization without momentum counts its batches, and counts are not per client"
    stack = Stack(bound, 2)
    local_runs = noise_runs(stack.bound_models, image_size=image_size, batch_size=4)
    try:
        loop.differentiate_one(local_runs)
        expected = [(row.gradients.clone(), row.params.changing.clone()) for row in stack.bound_models]
        for row in stack.bound_models:
            row.params.changing.copy_(bound.params.changing)
        stack.differentiate(local_runs)
    except Exception as error:  # noqa: BLE001  whatever a model's own code raises under vmap
        return f"{type(error).__name__}: {textwrap.shorten(str(error), 200)}"
    tolerance = COARSE_TOLERANCE if bound.compute.autocast else TOLERANCE
    for row, (gradients, values) in zip(stack.bound_models, expected, strict=True):
        moved = values - bound.params.changing  # by the pass: only statistics
        for name, wrong, right in (
            ("gradients", row.gradients - gradients, gradients),
            ("statistics", row.params.changing - values, moved),
        ):
            off = wrong.norm() / right.norm().clamp(min=1e-12)
            if not off < tolerance:
                return f"computed together, its {name} come out wrong by {off:.1e}"
    return None


def measure(bound: BoundModel, image_size: int, *, cohort_size: int) -> Measured:
    """Time a step of one client, and of a chunk of clients, on copies of the model and noise photos.

    Takes a few steps of each; on a CPU, a single step of a large model.

    Args:
        bound: the model; left unchanged.
        image_size: side of the photos in pixels.
        cohort_size: clients in a round.
    """
    chunk = min(cohort_size, default_count(bound), MEASURED_CHUNK)
    single = Stack(bound, 1)
    local_runs = noise_runs(single.bound_models, image_size=image_size, batch_size=bound.settings.batch_size)
    alone = seconds(lambda: loop.differentiate_one(local_runs), bound.compute.device)
    if chunk < 2:
        return Measured(alone=alone, together=None, chunk=chunk, reason="there is one client, or room for one")
    if bound.compute.device.type == "cpu" and alone > LONG_STEP:
        reason = f"a step takes {1000 * alone:.0f} ms: it keeps the processor busy by itself"
        return Measured(alone=alone, together=None, chunk=chunk, reason=reason)
    problem = find_problem(bound, image_size)
    if problem is not None:
        return Measured(alone=alone, together=None, chunk=chunk, reason=problem)
    stack = Stack(bound, chunk)
    runs_together = noise_runs(stack.bound_models, image_size=image_size, batch_size=bound.settings.batch_size)
    together = seconds(lambda: stack.differentiate(runs_together), bound.compute.device) / chunk
    return Measured(alone=alone, together=together, chunk=chunk)
