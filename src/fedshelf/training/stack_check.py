"""Whether a model's clients can be computed together, and whether that is faster. Both are tried, on copies.

Shapes: B batch, H = W pixels a side.
"""

import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from fedshelf.training import loop
from fedshelf.training.batches import Batch
from fedshelf.training.loop import Lane
from fedshelf.training.stack import Stack, default_count
from fedshelf.training.workbench import Workbench

TOLERANCE = 1e-3  # of the gradient's norm; roundings stay far below, a wrong formula does not
LONG_STEP = 0.02  # seconds: on a CPU, one client's step then keeps it busy, and there is nothing to gain
MARGIN = 0.9  # a gain below a tenth is not worth a result that is equal to rounding only
REPEATS = 2
MEASURED_CHUNK = 8  # larger ones gain a little more, and take as much longer to try


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Seconds per client and step, alone and together (None: not tried, `reason` says why)."""

    alone: float
    together: float | None
    chunk: int
    reason: str = ""

    def pays(self, workers: int = 1) -> bool:
        """Whether training together in one process beats as many processes that train client after client."""
        return self.together is not None and self.together < MARGIN * self.alone / max(1, workers)


def find_problem(bench: Workbench, image_size: int) -> str | None:
    """Why clients of this model cannot be computed together; None where their gradients come out right."""
    for child in bench.module.modules():
        if isinstance(child, _BatchNorm) and child.track_running_stats and child.momentum is None:
            return "batch normalization without momentum counts its batches, and counts are not per client"
    stack = Stack(bench, 2)
    lanes = _lanes(stack.benches, image_size, batch_size=4)
    try:
        loop.differentiate_alone(lanes)
        expected = [(bench.gradients.clone(), bench.params.vector.clone()) for bench in stack.benches]
        for seat in stack.benches:
            seat.params.vector.copy_(bench.params.vector)
        stack.differentiate(lanes)
    except Exception as error:  # noqa: BLE001  whatever a model's own code raises under vmap
        return f"{type(error).__name__}: {textwrap.shorten(str(error), 200)}"
    for seat, wanted in zip(stack.benches, expected, strict=True):
        found_here = (seat.gradients, seat.params.vector)
        for name, found, right in zip(("gradients", "statistics"), found_here, wanted, strict=True):
            off = (found - right).norm() / right.norm().clamp(min=1e-12)
            if not off < TOLERANCE:
                return f"computed together, its {name} come out wrong by {off:.1e}"
    return None


def measure(bench: Workbench, image_size: int, *, cohort_size: int) -> Measured:
    """Time a step of one client, and of a chunk of clients together, on copies of the model and photos of noise.

    Takes a few steps of either kind; on a CPU, a single step of a large model.
    """
    chunk = min(cohort_size, default_count(bench), MEASURED_CHUNK)
    single = Stack(bench, 1)
    lanes = _lanes(single.benches, image_size, bench.settings.batch_size)
    alone = _seconds(lambda: loop.differentiate_alone(lanes), bench)
    if chunk < 2:
        return Measured(alone=alone, together=None, chunk=chunk, reason="there is one client, or room for one")
    if bench.compute.device.type == "cpu" and alone > LONG_STEP:
        reason = f"a step takes {1000 * alone:.0f} ms: it keeps the processor busy by itself"
        return Measured(alone=alone, together=None, chunk=chunk, reason=reason)
    problem = find_problem(bench, image_size)
    if problem is not None:
        return Measured(alone=alone, together=None, chunk=chunk, reason=problem)
    stack = Stack(bench, chunk)
    lanes_together = _lanes(stack.benches, image_size, bench.settings.batch_size)
    together = _seconds(lambda: stack.differentiate(lanes_together), bench) / chunk
    return Measured(alone=alone, together=together, chunk=chunk)


def _lanes(benches: Sequence[Workbench], image_size: int, batch_size: int) -> list[Lane]:
    """Each with one batch of noise of its own."""
    generator = torch.Generator().manual_seed(0)
    lanes = []
    for bench in benches:
        images_BHWC = torch.randn(batch_size, image_size, image_size, 3, generator=generator).to(bench.compute.device)
        labels_B = torch.zeros(batch_size, dtype=torch.int64, device=bench.compute.device)
        lane = Lane(bench=bench, batches=iter(()), round=0, client_lr=0.0, num_examples=batch_size)
        lane.batch = Batch(images_BHWC.permute(0, 3, 1, 2), labels_B)
        lanes.append(lane)
    return lanes


def _seconds(step: Callable[[], object], bench: Workbench) -> float:
    """The least of some repeats, after one that warms up; a long step is its own warm-up."""
    times: list[float] = []
    while len(times) <= REPEATS and not (times and times[-1] > LONG_STEP * 10):
        _wait(bench)
        started = time.perf_counter()
        step()
        _wait(bench)
        times.append(time.perf_counter() - started)
    return min(times)


def _wait(bench: Workbench) -> None:
    if bench.compute.device.type == "cuda":
        torch.cuda.synchronize(bench.compute.device)
