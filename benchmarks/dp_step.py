"""*dp-step*: a step with the gradient of each photo and noise, relative to a plain step and to Opacus' hooks.

All are measured in turn, in one process on one thread, on the same batch of noise.
"""

import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import nn

from benchmarks import results
from benchmarks.results import Outcome
from fedshelf.models.resnet import resnet10
from fedshelf.privacy.dp_sgd import PrivateTraining
from fedshelf.privacy.noise import SecretRandom
from fedshelf.training import loop
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.device import Compute
from fedshelf.training.malloc import keep_freed_memory
from fedshelf.training.settings import TrainingSettings
from fedshelf.training.timing import noise_runs

NUM_CLASSES, WIDTH, IMAGE_SIZE, BATCH_SIZE = 81, 16, 48, 32
LIMIT = 2.0
PLAIN, OURS, HOOKS = "plain step", "FedShelf, `--dp sample`", "Opacus, hooks"


def measure(repetitions: int) -> Outcome:
    """Measure `repetitions` steps of each kind."""
    torch.set_num_threads(1)
    keep_freed_memory()
    steps, size = _steps()
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repetitions):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {
        name: statistics.median(own / plain for own, plain in zip(values, seconds[PLAIN], strict=True))
        for name, values in seconds.items()
    }
    rows = [[name, f"{1000 * medians[name]:.0f}", f"{ratios[name]:.2f}"] for name in steps]
    text = (
        f"{results.table(['', 'ms', 'relative'], rows)}\n\nresnet10 with group norm, width {WIDTH} ({size:,} "
        f"parameters), {IMAGE_SIZE} px, batch of {BATCH_SIZE}, one thread; {repetitions} steps of each, in turn. The "
        f"limit is {LIMIT}. Gradients, clipping and noise, without the optimizer's step. Opacus: gradients of single "
        "photos and their norms alone."
    )
    summary = {"ours": ratios[OURS], "opacus": ratios[HOOKS], "limit": LIMIT}
    return Outcome(summary={name: round(value, 3) for name, value in summary.items()}, text=text)


def _steps() -> tuple[dict[str, Callable[[], object]], int]:
    from opacus import GradSampleModule

    bound = BoundModel.of(
        resnet10(NUM_CLASSES, width=WIDTH, norm="group"), compute=Compute(device=torch.device("cpu"), autocast=False),
        settings=TrainingSettings(batch_size=BATCH_SIZE),
    )  # fmt: skip
    (run,) = noise_runs([bound], image_size=IMAGE_SIZE, batch_size=BATCH_SIZE)
    training, source = PrivateTraining(noise_multiplier=1.0, clip_norm=1.0), SecretRandom()
    batch = run.batch
    if batch is None:
        raise ValueError("a run without a batch")
    other = resnet10(NUM_CLASSES, width=WIDTH, norm="group")
    for layer in other.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = False  # Opacus' hooks do not allow it
    hooked, images = GradSampleModule(other, loss_reduction="sum"), batch.images.contiguous()

    def with_hooks() -> None:
        hooked.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nn.functional.cross_entropy(hooked(images), batch.labels, reduction="sum").backward()
        samples = [parameter.grad_sample for parameter in hooked.parameters()]
        torch.stack([sample.flatten(1).norm(dim=1) for sample in samples]).norm(dim=0)

    return {
        PLAIN: lambda: loop.differentiate_one([run]),
        OURS: lambda: training.differentiate(run, source.normal),
        HOOKS: with_hooks,
    }, bound.params.layout.num_trainable
