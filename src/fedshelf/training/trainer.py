"""The one training loop, and evaluation.

Shapes: B batch, T shared trainable values, S shared values.
"""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedshelf.core.errors import FedShelfError
from fedshelf.core.messages import Broadcast, Upload
from fedshelf.core.rng import Rng
from fedshelf.data.augmentation import augment, normalize
from fedshelf.data.dataset import PhotoSet
from fedshelf.training.workbench import GradientHook, Workbench

EVALUATION_BATCH = 250


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """What local training did. `loss` is the mean over all photos seen (nats)."""

    num_examples: int
    num_steps: int
    loss: float
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """How a model does on a photo set."""

    num_examples: int
    num_correct: int
    loss_sum: float

    @property
    def accuracy(self) -> float | None:
        return self.num_correct / self.num_examples if self.num_examples else None

    @property
    def loss(self) -> float | None:
        return self.loss_sum / self.num_examples if self.num_examples else None


@dataclass(frozen=True, kw_only=True, eq=False)
class Trainer:
    """One client's photos on a workbench. `rng` is the run's root; draws are keyed by round and client."""

    workbench: Workbench
    client: str
    rng: Rng
    train: PhotoSet
    validation: PhotoSet

    def upload(self, broadcast: Broadcast, *, gradient_hook: GradientHook | None = None) -> Upload:
        """Train from the broadcast model and return the difference, local minus global."""
        self.workbench.load(broadcast.params)
        fit = self.fit(round=broadcast.key.round, client_lr=broadcast.client_lr, gradient_hook=gradient_hook)
        return Upload(
            key=broadcast.key,
            delta=self.workbench.params.shared.to(broadcast.params.device) - broadcast.params,
            num_examples=fit.num_examples,
            num_steps=fit.num_steps,
            train_loss=fit.loss,
            seconds=fit.seconds,
        )

    def fit(self, *, round: int, client_lr: float, gradient_hook: GradientHook | None = None) -> Fit:
        """Train for the configured epochs with a fresh optimizer.

        Raises:
            FedShelfError: the loss became infinite or not a number; nothing of such a round is of use.
        """
        bench = self.workbench
        started = time.perf_counter()
        bench.module.train()
        optimizer = bench.make_optimizer(client_lr)
        trainable = bench.params.trainable
        gradients = bench.gradients[: bench.params.layout.num_trainable]
        loss_sum = torch.zeros((), dtype=torch.float64)
        num_steps = num_seen = 0
        for images_BCHW, labels_B in self._batches(round):
            bench.gradients.zero_()
            logits_BK = bench.logits(images_BCHW)
            loss = F.cross_entropy(logits_BK, labels_B, label_smoothing=bench.settings.label_smoothing)
            loss.backward()
            self._clip()
            if gradient_hook is not None:
                gradient_hook(gradients, trainable)
            optimizer.step()
            loss_sum += loss.detach().cpu().double() * len(labels_B)
            num_steps += 1
            num_seen += len(labels_B)
        mean_loss = loss_sum.item() / max(1, num_seen)
        if not math.isfinite(mean_loss):
            raise FedShelfError(f"training diverged in round {round}: the loss is {mean_loss}; lower --client-lr")
        seconds = time.perf_counter() - started
        return Fit(num_examples=len(self.train), num_steps=num_steps, loss=mean_loss, seconds=seconds)

    def evaluate(self) -> Score:
        """Score the workbench's present model on this client's validation photos."""
        return evaluate(self.workbench, self.validation)

    def _batches(self, round: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Each epoch's photos in a fresh order, augmented on the batch.

        A last batch of one photo is left out where batch normalization could not use it, unless all batches are such.
        """
        bench, settings = self.workbench, self.workbench.settings
        order_rng = self.rng.fork(round=round, client=self.client, purpose="shuffle").torch()
        augment_rng = self.rng.fork(round=round, client=self.client, purpose="augment").torch()
        smallest = 2 if _has_batch_norm(bench.module) and min(len(self.train), settings.batch_size) > 1 else 1
        for _ in range(settings.local_epochs):
            order = torch.randperm(len(self.train), generator=order_rng).numpy()
            for chosen in np.split(order, range(settings.batch_size, len(order), settings.batch_size)):
                if len(chosen) < smallest:
                    continue
                images_BHWC, labels_B = _take(self.train, chosen)
                yield self._prepare(images_BHWC, augment_rng), labels_B.to(bench.compute.device)

    def _prepare(self, images_BHWC: Tensor, generator: torch.Generator) -> Tensor:
        bench = self.workbench
        mean, std = bench.normalization.mean, bench.normalization.std
        if bench.settings.augmentation is None:
            return normalize(images_BHWC, device=bench.compute.device, mean=mean, std=std)
        return augment(
            images_BHWC, settings=bench.settings.augmentation, generator=generator, device=bench.compute.device,
            mean=mean, std=std,
        )  # fmt: skip

    def _clip(self) -> None:
        bound = self.workbench.settings.gradient_clip
        if bound:
            gradients = self.workbench.gradients  # statistics have no gradient: those values stay zero
            gradients.mul_((bound / (gradients.norm() + 1e-6)).clamp(max=1.0))


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchScore:
    """One evaluation batch."""

    num_examples: int
    num_correct: int
    loss_sum: float


def evaluate(bench: Workbench, photos: PhotoSet) -> Score:
    """Score the workbench's present model."""
    return total(evaluate_batches(bench, photos, range(num_batches(photos))))


def num_batches(photos: PhotoSet) -> int:
    """How many batches an evaluation of `photos` has."""
    return math.ceil(len(photos) / EVALUATION_BATCH)


def evaluate_batches(bench: Workbench, photos: PhotoSet, batches: Iterable[int]) -> list[BatchScore]:
    """Score single batches; the cuts are fixed, so batches can be shared out among processes."""
    bench.module.eval()
    mean, std = bench.normalization.mean, bench.normalization.std
    scores = []
    with torch.inference_mode():
        for start in (batch * EVALUATION_BATCH for batch in batches):
            chosen = np.arange(start, min(start + EVALUATION_BATCH, len(photos)))
            images_BHWC, labels_B = _take(photos, chosen)
            labels_B = labels_B.to(bench.compute.device)
            logits_BK = bench.logits(normalize(images_BHWC, device=bench.compute.device, mean=mean, std=std))
            loss = F.cross_entropy(logits_BK, labels_B, reduction="sum").item()
            correct = int((logits_BK.argmax(1) == labels_B).sum())
            scores.append(BatchScore(num_examples=len(chosen), num_correct=correct, loss_sum=loss))
    return scores


def total(batches: Iterable[BatchScore]) -> Score:
    """The sum over batches, exact in whatever order they come."""
    scores = list(batches)
    return Score(
        num_examples=sum(score.num_examples for score in scores),
        num_correct=sum(score.num_correct for score in scores),
        loss_sum=math.fsum(score.loss_sum for score in scores),
    )


def _take(photos: PhotoSet, chosen: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]") -> tuple[Tensor, Tensor]:
    return torch.from_numpy(photos.images[chosen]), torch.from_numpy(photos.labels[chosen])


def _has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(child, nn.modules.batchnorm._BatchNorm) for child in module.modules())
