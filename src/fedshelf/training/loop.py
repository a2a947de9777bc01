"""The single training loop, for one client or many side by side.

Shapes: T shared trainable values.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedshelf.core.errors import TrainingError
from fedshelf.training import optimizer
from fedshelf.training.batches import Batch
from fedshelf.training.bound_model import BoundModel, GradientHook
from fedshelf.training.losses import Calibration
from fedshelf.training.phases import Moves


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """The outcome of local training.

    Attributes:
        num_examples: photos trained on.
        num_steps: steps taken.
        loss: mean training loss over all photos seen (nats).
        seconds: duration.
    """

    num_examples: int
    num_steps: int
    loss: float
    seconds: float


@dataclass(kw_only=True, eq=False)
class LocalRun:
    """One client's local training in progress.

    Attributes:
        bound: the model to train.
        batches: source of batches.
        round: the round.
        client_lr: learning rate.
        num_examples: photos trained on.
        gradient_hook: called at steps that move shared values.
        calibration: calibration of the client's loss; None: plain cross-entropy.
        moves: the values that the optimizer moves.
        batch: the current batch.
    """

    bound: BoundModel
    batches: Iterator[Batch]
    round: int
    client_lr: float
    num_examples: int
    gradient_hook: GradientHook | None = None
    calibration: Calibration | None = None
    moves: Moves = Moves.ALL
    batch: Batch | None = field(default=None, init=False)
    _losses: list[Tensor] = field(default_factory=list, init=False)
    _sizes: list[int] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        bound = self.bound
        head = bound.head_range if self.moves is Moves.HEAD or bound.settings.has_head_lr else None
        self.optimizer = optimizer.start(bound.params, bound.gradients, bound.settings, self.moves, head)

    @property
    def size(self) -> int:
        """Photos in the current batch."""
        return len(self.batch.labels) if self.batch is not None else 0

    def draw(self) -> bool:
        """Take the next batch; False if there is none."""
        self.batch = next(self.batches, None)
        return self.batch is not None

    def note(self, loss: Tensor, size: int) -> None:
        """Record the mean loss of a batch of `size` photos, without synchronizing with a GPU."""
        self._losses.append(loss)
        self._sizes.append(size)

    def result(self, seconds: float) -> Fit:
        """The outcome of the training.

        Raises:
            TrainingError: the loss became infinite or NaN; the whole round is unusable.
        """
        losses: list[float] = torch.stack(self._losses).tolist() if self._losses else []
        loss_sum = 0.0
        for loss, size in zip(losses, self._sizes, strict=True):
            loss_sum += loss * size
        mean_loss = loss_sum / max(1, sum(self._sizes))
        if not math.isfinite(mean_loss):
            raise TrainingError(f"training diverged in round {self.round}: the loss is {mean_loss}; lower --client-lr")
        return Fit(num_examples=self.num_examples, num_steps=len(losses), loss=mean_loss, seconds=seconds)


Run = Callable[[LocalRun], float]
"""Trains a local run to its end, alone or with others, and returns its share of the time in seconds."""

Differentiate = Callable[[Sequence[LocalRun]], Sequence[Tensor]]
"""Fills the gradients of local runs with equal batch size, and returns the mean loss of each."""


def train(local_runs: Sequence[LocalRun], differentiate: Differentiate) -> None:
    """Train all local runs side by side, step by step, on all of their batches.

    Args:
        local_runs: runs with the same settings and learning rate.
        differentiate: computes the gradients.
    """
    active = [local_run for local_run in local_runs if local_run.draw()]
    while active:
        for group in _by_size(active):
            settings = group[0].bound.settings
            losses = differentiate(group)
            for local_run, loss in zip(group, losses, strict=True):
                local_run.note(loss, local_run.size)
            clip_gradients(group)
            for local_run in group:
                hook_gradients(local_run)
            optimizer.step([local_run.optimizer for local_run in group], settings, group[0].client_lr)
        active = [local_run for local_run in active if local_run.draw()]


def alone(local_run: LocalRun) -> float:
    """`Run` for a single client."""
    started = time.perf_counter()
    train([local_run], differentiate_one)
    return time.perf_counter() - started


def differentiate_one(local_runs: Sequence[LocalRun]) -> Sequence[Tensor]:
    """`Differentiate` by plain autograd, one local run after another."""
    losses = []
    for local_run in local_runs:
        bound = local_run.bound
        if not bound.module.training:
            bound.train()
        bound.gradients.zero_()
        if local_run.batch is not None:
            images, labels, teacher_logits = local_run.batch
            loss = bound.loss(images, labels, local_run.calibration, teacher_BK=teacher_logits)
            loss.backward()
            losses.append(loss.detach())
    return losses


def hook_gradients(local_run: LocalRun) -> None:
    """Call the gradient hook of a step that moves shared values."""
    if local_run.gradient_hook is not None and local_run.moves is not Moves.PERSONAL:
        params = local_run.bound.params
        local_run.gradient_hook(local_run.bound.gradients[: params.layout.num_trainable], params.trainable)


def _clipped(local_run: LocalRun) -> list[Tensor]:
    """The gradients whose norms are bounded one by one."""
    apart = len(set(local_run.optimizer.factors)) > 1
    return local_run.optimizer.gradients if apart else [local_run.bound.gradients]


def clip_gradients(local_runs: Sequence[LocalRun]) -> None:
    """Clip the norm of each gradient, if configured. Statistics have no gradient, so their values are zero.

    Gradients of groups with a learning rate of their own are clipped apart, others together [M].
    """
    bound = local_runs[0].bound.settings.gradient_clip
    for gradient in (gradient for local_run in local_runs if bound for gradient in _clipped(local_run)):
        gradient.mul_((bound / (gradient.norm() + 1e-6)).clamp(max=1.0))


def _by_size(local_runs: Sequence[LocalRun]) -> list[list[LocalRun]]:
    """Group local runs whose current batches have the same size, to compute them together."""
    groups: dict[int, list[LocalRun]] = {}
    for local_run in local_runs:
        groups.setdefault(local_run.size, []).append(local_run)
    return list(groups.values())
