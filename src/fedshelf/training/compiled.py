"""The forward pass through torch.compile, where it was asked for or was measured to be faster.

On CPUs it was slower in every measurement (docs/explanation/simulation-engines.md) and takes minutes to begin with:
there it must be asked for.
"""

import textwrap
from dataclasses import dataclass, replace

import torch

from fedshelf.core.choices import CompileChoice
from fedshelf.core.errors import UsageError
from fedshelf.training.bound_model import Workbench
from fedshelf.training.loop import differentiate_alone
from fedshelf.training.timing import noise_lanes, seconds

MARGIN = 0.95  # a smaller gain is within the noise of so short a measurement


@dataclass(frozen=True, kw_only=True, eq=False)
class Compiled:
    """The workbench to train on, whether it is compiled, and why (or why not)."""

    bench: Workbench
    compiled: bool
    reason: str


def choose_forward(
    bench: Workbench, image_size: int, choice: CompileChoice, *, backend: str = "inductor"
) -> Compiled:  # fmt: skip
    """Compile the model's training pass as `choice` says; 'auto' times both ways on a GPU. Values stay as they are.

    Raises:
        UsageError: the choice is 'on' and the model cannot be compiled here.
    """
    device = bench.compute.device
    if choice == "off" or (choice == "auto" and device.type != "cuda"):
        reason = "switched off" if choice == "off" else f"not tried on {device.type}: it was slower wherever measured"
        return Compiled(bench=bench, compiled=False, reason=reason)
    before = bench.params.vector.clone()
    compiled = replace(bench, forward=torch.compile(bench.module, backend=backend))
    try:
        plain, fast = (_step_seconds(each, image_size) for each in (bench, compiled))
    except Exception as error:  # noqa: BLE001  the compiler's own failures, and those of the model's code in it
        reason = f"the model cannot be compiled here: {type(error).__name__}: {textwrap.shorten(str(error), 200)}"
        if choice == "on":
            raise UsageError(f"--compile on: {reason}") from None
        return Compiled(bench=bench, compiled=False, reason=reason)
    finally:
        bench.params.vector.copy_(before)  # the steps moved the statistics
    reason = f"{1000 * fast:.1f} ms a step compiled, {1000 * plain:.1f} ms plain"
    if choice == "on" or fast < MARGIN * plain:
        return Compiled(bench=compiled, compiled=True, reason=reason)
    return Compiled(bench=bench, compiled=False, reason=reason)


def _step_seconds(bench: Workbench, image_size: int) -> float:
    lanes = noise_lanes([bench], image_size=image_size, batch_size=bench.settings.batch_size)
    differentiate_alone(lanes)  # compiles
    return seconds(lambda: differentiate_alone(lanes), bench.compute.device)
