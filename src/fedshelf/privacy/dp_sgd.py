"""DP-SGD at a store: Abadi et al. 2016, "Deep Learning with Differential Privacy", Algorithm 1.

     1  for each of T local steps:
     2    L <- each of the store's n photos with probability q = B/n, independently
     3    for each photo i in L:
     4      g_i <- gradient of its loss
     5      g_i <- g_i · c(‖g_i‖)
     6    g <- (sum_i g_i + N(0, sigma² C²)) / B
     7    take a step of the local optimizer with g

All that an upload says about the photos follows from the values of line 6: weights, control variates and momentum. So
the release of a whole round is that of T Gaussian mechanisms with Poisson sampling (`privacy.accounting`).

    flat        c = min(1, C/‖g‖)                      Abadi et al. 2016
    layer       c = min(1, C/(√m ‖g_l‖)) for each of the m layers l       McMahan et al. 2018, "A General Approach"
    automatic   c = C/(‖g‖ + 0.01)                     Bu et al. 2023, "Automatic Clipping", eq. 4 (AUTO-S)

Differs from the paper: line 2 draws the photos secretly, by a cryptographic generator, as does line 6; B is the
configured batch size, whatever the number of photos drawn, including none. Augmentation is drawn anew at each training,
not from the run's seed: the views of a batch would depend on which photos are in it, and a photo would change those of
others by more than C.

Shapes: B photos of a batch, M values of a model that change.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeAlias

from fedshelf.core.settings import PRIVACY, Setting
from fedshelf.privacy.base import Noise, Unit
from fedshelf.privacy.clipping import CLIP_NORM, problems_with_norm

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from fedshelf.training.batches import Amount
    from fedshelf.training.loop import LocalRun

Clipping = Literal["flat", "layer", "automatic"]
Normal: TypeAlias = "Callable[[int], Tensor]"

AUTOMATIC_OFFSET = 0.01
CLIP_NORMS = (1e-6, 1e6)  # beyond them, float32 rounds the sums, or overflows, before the noise is added
MEMORY = 1 << 28  # bytes of the gradients that are held at once


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleDP(Noise):
    """Differential privacy for each photo, by noise in the store's own training.

    Attributes:
        clip_norm: bound on the gradient of a photo (C).
        clipping: how the bound is kept.
        projection: number of features that `PrivateRidge` makes of a photo's.
    """

    clip_norm: Annotated[float, CLIP_NORM] = 1.0
    clipping: Annotated[Clipping, Setting(key="clipping", panel=PRIVACY, help="How the gradient of each photo is "
        "bounded: as a whole (flat), layer by layer, or by scaling all to about the norm "
        "(automatic).")] = "flat"  # fmt: skip
    projection: Annotated[int, Setting(key="projection", ge=1, panel=PRIVACY, only_with=("algorithm", "ridge"),
        help="With --algorithm ridge: project the features of a photo to this many, which need less noise.",
        )] = 256  # fmt: skip
    name: ClassVar[str] = "sample"
    unit: ClassVar[Unit | None] = "photo"

    def problems(self) -> list[str]:
        """What is contradictory in the settings."""
        return [
            *Noise.problems(self),
            *(problems_with_norm(self.clip_norm) or _problems_with_size(self.clip_norm)),
        ]


def _problems_with_size(clip_norm: float) -> list[str]:
    low, high = CLIP_NORMS
    if low <= clip_norm <= high:
        return []
    return [f"--clip-norm {clip_norm:g} with --dp sample: noise in float32 covers norms from {low:g} to {high:,.0f}"]


@dataclass(frozen=True, kw_only=True)
class PrivateTraining:
    """A `Run` of `training.loop` in which every step is noised. Its batches must be drawn by `poisson`.

    Attributes:
        noise_multiplier: standard deviation of the noise, as a multiple of the clip norm.
        clip_norm: bound on the gradient of a photo.
        clipping: how the bound is kept.
        key: returns the key of a generator's noise; None draws a new one each time.
    """

    noise_multiplier: float
    clip_norm: float
    clipping: Clipping = "flat"
    key: bytes | None = field(default=None, repr=False)

    def __call__(self, local_run: LocalRun) -> float:
        """Train a local run to its end; return the duration in seconds."""
        from fedshelf.privacy.noise import SecretRandom
        from fedshelf.training.loop import train

        started, source = time.perf_counter(), SecretRandom(self.key)

        def all_noised(local_runs: Sequence[LocalRun]) -> Sequence[Tensor]:
            return [self.differentiate(each, source.normal) for each in local_runs]

        train([local_run], all_noised)
        return time.perf_counter() - started

    def differentiate(self, local_run: LocalRun, normal: Normal) -> Tensor:
        """Lines 3 to 6; returns zero for the loss, which has no noise: one that is not finite would be reported."""
        import torch

        bound = local_run.bound
        moved = local_run.optimizer.gradients
        bound.gradients.zero_()
        if local_run.size:
            sum_clipped(local_run, self.clip_norm, self.clipping)
        for region in moved:
            noise = normal(len(region)).to(region.device)
            region.add_(noise, alpha=self.noise_multiplier * self.clip_norm).div_(bound.settings.batch_size)
        return torch.zeros(())


def poisson(amount: Amount, generator: torch.Generator) -> Iterator[NDArray[np.int64]]:
    """`Draw` each photo with the same probability at every step, secretly: the run's generator is not used."""
    import numpy as np

    from fedshelf.privacy.noise import SecretRandom

    rate, source = sampling_rate(amount.num_photos, amount.batch_size), SecretRandom()
    for _ in range(num_steps(amount.num_photos, amount.batch_size, amount.epochs, amount.num_steps)):
        yield np.flatnonzero(source.uniform(amount.num_photos) < rate)


def sampling_rate(num_photos: int, batch_size: int) -> float:
    """The probability (q) with which a step uses a photo."""
    return min(1.0, batch_size / num_photos) if num_photos else 1.0


def num_steps(num_photos: int, batch_size: int, epochs: int, given: int | None = None) -> int:
    """Steps (T) of a training: as many as batches of the configured size make up the epochs, unless `given`."""
    return epochs * max(1, math.ceil(num_photos / batch_size)) if given is None else given


def sum_clipped(local_run: LocalRun, clip_norm: float, clipping: Clipping) -> None:
    """Lines 3 to 5: add the clipped gradients of all photos of the current batch to the bound gradients.

    Args:
        local_run: the training, with a batch. Only values that its optimizer moves get a gradient.
        clip_norm: bound on the gradient of a photo.
        clipping: how the bound is kept.
    """
    import torch
    from torch.func import functional_call, grad, vmap

    from fedshelf.core.params import Params

    bound, batch = local_run.bound, local_run.batch
    if batch is None:
        raise ValueError("a training without a batch")
    if not bound.module.training:
        bound.train()
    prefix = "" if bound.head is None else f"{bound.head}."
    first = bound.gradients.storage_offset()
    spans = [(region.storage_offset() - first, len(region)) for region in local_run.optimizer.gradients]
    values = bound.params.views(frozen=False)
    moved = {
        spec.name.removeprefix(prefix): values[spec.name].contiguous()  # 5 % faster than channels_last
        for spec in bound.params.layout.tensors
        if any(start <= spec.offset < start + size for start, size in spans)
    }
    into = Params(bound.gradients, bound.params.layout).views(frozen=False)

    def loss(named: dict[str, Tensor], image: Tensor, label: Tensor, asked_K: Tensor | None) -> Tensor:
        return bound.loss(
            image.unsqueeze(0), label.unsqueeze(0), local_run.calibration,
            teacher_BK=None if asked_K is None else asked_K.unsqueeze(0),
            forward=lambda given: functional_call(bound.trained, named, (given,)),
        )  # fmt: skip

    asked_BK = batch.teacher_logits
    together = vmap(grad(loss), in_dims=(None, 0, 0, None if asked_BK is None else 0), randomness="different")
    chunk = max(1, MEMORY // (4 * sum(value.numel() for value in moved.values())))
    for start in range(0, len(batch.labels), chunk):
        some = slice(start, start + chunk)
        asked = None if asked_BK is None else asked_BK[some]
        found = together(moved, batch.images[some], batch.labels[some], asked)
        with torch.no_grad():
            for names, factors_B in _factors(found, clip_norm, clipping):
                for name in names:
                    into[prefix + name].add_(torch.tensordot(factors_B, found[name], dims=1))


def _factors(
    gradients: dict[str, Tensor], clip_norm: float, clipping: Clipping
) -> Iterator[tuple[Sequence[str], Tensor]]:
    """Line 5: the factor [B] of each photo's gradient, for the tensors of each layer or for all.

    A photo whose gradient is not finite is left out; its gradient is zeroed in place.
    """
    import torch

    norms = {name: torch.linalg.vector_norm(gradient.flatten(1), dim=1) for name, gradient in gradients.items()}
    total = _joint(norms.values())
    if not (finite := total.isfinite()).all():
        for gradient in gradients.values():
            gradient[~finite] = 0
        norms = {name: norm.where(finite, 0) for name, norm in norms.items()}
        total = total.where(finite, 0)
    if clipping == "automatic":
        yield tuple(gradients), clip_norm / (total + AUTOMATIC_OFFSET)
    elif clipping == "flat":
        yield tuple(gradients), (clip_norm / total).clamp(max=1.0)
    else:
        layers: dict[str, list[str]] = {}
        for name in gradients:
            layers.setdefault(name.rpartition(".")[0], []).append(name)
        bound = clip_norm / math.sqrt(len(layers))
        for names in layers.values():
            yield names, (bound / _joint(norms[name] for name in names)).clamp(max=1.0)


def _joint(norms: Iterable[Tensor]) -> Tensor:
    """The norm [B] of several vectors together, given theirs."""
    import torch

    joint: Tensor = torch.linalg.vector_norm(torch.stack(list(norms)), dim=0)
    return joint
