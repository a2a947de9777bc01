"""Timing of steps on noise, to choose the faster of two variants before a run.

Shapes: B batch, H = W pixels a side.
"""

import time
from collections.abc import Callable, Sequence

import torch

from fedshelf.training.batches import Batch
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.loop import LocalRun

LONG_STEP = 0.02  # seconds: on a CPU, one client's step then uses it fully, and call overhead is negligible
REPEATS = 2


def noise_runs(bound_models: Sequence[BoundModel], *, image_size: int, batch_size: int) -> list[LocalRun]:
    """Local runs that are ready for a step on a batch of noise [B, 3, H, W], or [B, D] for a head on D features.

    Args:
        bound_models: one per run.
        image_size: H and W.
        batch_size: B.
    """
    generator = torch.Generator().manual_seed(0)
    local_runs = []
    for bound in bound_models:
        shape = (image_size, image_size, 3) if bound.num_features is None else (bound.num_features,)
        inputs = torch.randn(batch_size, *shape, generator=generator).to(bound.compute.device)
        labels_B = torch.zeros(batch_size, dtype=torch.int64, device=bound.compute.device)
        local_run = LocalRun(bound=bound, batches=iter(()), round=0, client_lr=0.0, num_examples=batch_size)
        local_run.batch = Batch(inputs.permute(0, 3, 1, 2) if inputs.dim() == 4 else inputs, labels_B)
        local_runs.append(local_run)
    return local_runs


def seconds(step: Callable[[], object], device: torch.device) -> float:
    """Minimum time of several calls after a warm-up; a very long step is its own warm-up."""
    times: list[float] = []
    while len(times) <= REPEATS and not (times and times[-1] > 10 * LONG_STEP):
        times.append(once(step, device))
    return min(times)


def once(
    step: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> float:  # fmt: skip
    """Seconds of one call, until the device has finished."""
    _wait(device)
    started = clock()
    step()
    _wait(device)
    return clock() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
