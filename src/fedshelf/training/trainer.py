"""A client's training and evaluation.

Shapes: B batch, K classes, S shared values.
"""

import math
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fedshelf.core.errors import TrainingError
from fedshelf.core.messages import DELTA, Broadcast, TaskKey, Upload, keyed
from fedshelf.core.rng import Rng
from fedshelf.data.augmentation import normalize
from fedshelf.data.photo_set import PhotoSet
from fedshelf.models.head import linear_head
from fedshelf.training import loop
from fedshelf.training.batches import Batch, Draw, batches, gather, prefetch, shuffled
from fedshelf.training.bound_model import BoundModel, GradientHook
from fedshelf.training.cross_entropy import calibration_of
from fedshelf.training.distillation import Teacher
from fedshelf.training.features import featurized
from fedshelf.training.loop import Fit, LocalRun, Run
from fedshelf.training.losses import Calibration
from fedshelf.training.phases import Moves, Phase
from fedshelf.training.resources import lacks_memory
from fedshelf.training.settings import TrainingSettings

EVALUATION_BATCH = 250


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A model's score on a photo set.

    Attributes:
        num_examples: photos evaluated.
        num_correct: photos classified correctly.
        loss_sum: sum of plain cross-entropy over all classes (nats).
        confusion: photos by class and predicted class.
    """

    num_examples: int
    num_correct: int
    loss_sum: float
    confusion: Mapping[tuple[int, int], int] = field(default_factory=dict)

    @property
    def accuracy(self) -> float | None:
        """Fraction of correct predictions; None if there are no photos."""
        return self.num_correct / self.num_examples if self.num_examples else None

    @property
    def loss(self) -> float | None:
        """Mean loss (nats); None if there are no photos."""
        return self.loss_sum / self.num_examples if self.num_examples else None


@dataclass(frozen=True, kw_only=True, eq=False)
class Trainer:
    """Trains and evaluates a bound model on one client's photos.

    Attributes:
        bound_model: the model.
        client: the client's name.
        rng: the run's root generator; draws are keyed by round and client.
        train: training photos.
        validation: validation photos.
        run: trains local runs, alone or with other clients.
        draw: draws the photos of each batch.
        is_private: whether the run has noise: random views then do not follow from `rng`, so that no photo changes
            the views of others.
        num_classes: K; only required by losses that depend on the client's classes.
        phases: phases of local training, each with a fresh optimizer.
        renews: whether each attempt at a task draws anew (in asynchronous rounds, a second training from one
            model).
        growth: this client's batch size divided by the configured one; one of its steps counts as this many
            (training/batch_size.py).
        lr_scale: factor on its learning rate.
        features_folder: folder in which features of photos are kept; None keeps none.
        teacher: a model to learn from, as the settings say.
    """

    bound_model: BoundModel
    client: str
    rng: Rng
    train: PhotoSet
    validation: PhotoSet
    run: Run = loop.alone
    draw: Draw = shuffled
    is_private: bool = False
    num_classes: int | None = None
    phases: tuple[Phase, ...] = (Phase(),)
    renews: bool = False
    growth: int = 1
    lr_scale: float = 1.0
    features_folder: Path | None = None
    teacher: Teacher | None = None

    def features(self, photos: PhotoSet) -> NDArray[np.float32]:
        """[N, D]: what enters the model's output layer for photos as they are evaluated, at its current values.

        Raises:
            ModelError: the model's last step is not a single linear output layer.
        """
        found = featurized(self.bound_model, photos, cache=self.features_folder)
        num_features = linear_head(self.bound_model.module)[1].in_features  # without the figures of sales
        return np.ascontiguousarray(found.images[:, 0, :num_features], dtype=np.float32)

    @cached_property
    def calibration(self) -> Calibration | None:
        """The configured loss's calibration for this client."""
        bound = self.bound_model
        return calibration_of(bound.settings.loss, self.train.labels, self.num_classes, bound.compute.device)

    def having(self, settings: TrainingSettings) -> "Trainer":
        """A copy with other settings of local training, on the same bound model."""
        return replace(self, bound_model=replace(self.bound_model, settings=settings))

    def upload(self, broadcast: Broadcast, *, gradient_hook: GradientHook | None = None) -> Upload:
        """Train from the broadcast model and return the difference, local minus global.

        Args:
            broadcast: the task.
            gradient_hook: called at steps that move shared values.
        """
        self.bound_model.load(broadcast.params)
        fit = self.fit(
            round=broadcast.key.round, client_lr=broadcast.client_lr, gradient_hook=gradient_hook,
            part=self.part(broadcast.key), num_steps=broadcast.num_steps,
        )  # fmt: skip
        return Upload(
            key=broadcast.key,
            vectors={DELTA: self.bound_model.params.shared.to(broadcast.params.device) - broadcast.params},
            num_examples=fit.num_examples,
            num_steps=fit.num_steps,
            train_loss=fit.loss,
            seconds=fit.seconds,
            batch_size=self.bound_model.settings.batch_size,
            client_lr=self.lr_scale * broadcast.client_lr,
        )

    def part(self, key: TaskKey, name: str = "") -> str:
        """The `part` in `fit` for the training `name` of a task."""
        return keyed(name, key) if self.renews else name

    def fit(
        self, *, round: int, client_lr: float, gradient_hook: GradientHook | None = None, part: str = "",
        num_steps: int | None = None,
    ) -> Fit:  # fmt: skip
        """Train through all phases from the bound model's current values.

        Args:
            round: keys the draws.
            client_lr: learning rate, before it is scaled.
            gradient_hook: called at steps that move shared values.
            part: identifies one of several trainings in a round.
            num_steps: steps of each phase that moves shared values, instead of its epochs, counted in configured
                batch size.

        Returns:
            The last phase's loss; the steps of all phases that move shared values; the total time.

        Raises:
            TrainingError: the loss became infinite or NaN; the whole round is unusable.
        """
        fits: list[Fit] = []
        own_steps = None if num_steps is None else max(1, int(num_steps / self.growth + 0.5))
        taken = 0
        for number, phase in enumerate(self.phases):
            made = self._batches(
                round, epochs=phase.epochs, num_steps=None if phase.moves is Moves.PERSONAL else own_steps,
                part=f"{part}-{number}" if number or part else "",
            )  # fmt: skip
            local_run = LocalRun(
                bound=self.bound_model, batches=made, round=round, num_examples=len(self.train),
                client_lr=self.lr_scale * client_lr, gradient_hook=gradient_hook, calibration=self.calibration,
                moves=self._moves(phase, round),
            )  # fmt: skip
            fits.append(self._train(local_run))
            taken += fits[-1].num_steps if phase.moves is not Moves.PERSONAL else 0
        return replace(fits[-1], num_steps=taken, seconds=sum(fit.seconds for fit in fits))

    def _moves(self, phase: Phase, round: int) -> Moves:
        """What a phase moves in a round: first the output layer alone, if so configured."""
        is_first = round <= self.bound_model.settings.unfreeze_after
        return Moves.HEAD if is_first and phase.moves is not Moves.PERSONAL else phase.moves

    def gradient(self, *, round: int) -> Tensor:
        """[T]: the gradient of the mean loss over all training photos, at the bound model's current values.

        One pass over a round's batches, each gradient clipped as in training. The model is left unchanged.
        """
        sums = torch.zeros_like(self.bound_model.params.trainable)

        def add(gradient: Tensor, values: Tensor) -> None:
            size = 0 if local_run.batch is None else len(local_run.batch.labels)
            sums.add_(gradient, alpha=size / len(self.train))

        local_run = LocalRun(
            bound=self.bound_model, batches=self._batches(round, epochs=1), round=round, client_lr=0.0,
            num_examples=len(self.train), gradient_hook=add, calibration=self.calibration,
        )  # fmt: skip
        before = self.bound_model.params.changing.clone()
        self._train(local_run)
        self.bound_model.params.changing.copy_(before)  # restore batch-norm statistics
        return sums

    def evaluate(self) -> Score:
        """Score the bound model on this client's validation photos, by plain cross-entropy."""
        return evaluate(self.bound_model, self.validation)

    def _train(self, local_run: LocalRun) -> Fit:
        """Train to the end; convert torch's errors to a `TrainingError` that says what to do."""
        try:
            return local_run.result(self.run(local_run))
        except (RuntimeError, ValueError) as error:
            if lacks_memory(error):
                raise TrainingError(
                    "no memory for a batch: lower --batch-size"
                    if self.is_private  # how many photos were drawn is a secret
                    else f"no memory for a batch of {local_run.size}: lower --batch-size ({error})"
                ) from error
            if self.bound_model.has_batch_norm and "more than 1 value per channel" in str(error):
                raise TrainingError(
                    "batch normalization cannot train on a single photo at this --image-size: give this store at least "
                    "two photos, or use --norm group, a larger --image-size, or --batch-size 2 and more",
                    will_repeat=True,
                ) from error
            raise TrainingError(f"training failed: {type(error).__name__}: {error}") from error

    def _batches(
        self, round: int, *, epochs: int | None = None, num_steps: int | None = None, part: str = ""
    ) -> Iterator[Batch]:  # fmt: skip
        rng = Rng(secrets.randbits(63)) if self.is_private else self.rng
        made = batches(
            self.bound_model, self.train, rng, round=round, client=self.client, epochs=epochs, num_steps=num_steps,
            part=part, draw=self.draw, teacher=self.teacher,
        )  # fmt: skip
        return prefetch(made) if self.bound_model.compute.device.type == "cuda" else made


def evaluate(bound: BoundModel, photos: PhotoSet) -> Score:
    """Score the bound model on photos."""
    return total(evaluate_batches(bound, photos, range(num_batches(photos))))


def num_batches(photos: PhotoSet) -> int:
    """Number of batches in an evaluation of `photos`."""
    return math.ceil(len(photos) / EVALUATION_BATCH)


def evaluate_batches(bound: BoundModel, photos: PhotoSet, batches: Iterable[int]) -> list[Score]:
    """Score the given batches; their boundaries are fixed, so that processes can share them."""
    return [_score(logits_BK, labels_B) for logits_BK, labels_B in logits(bound, photos, batches)]


def _score(logits_BK: Tensor, labels_B: Tensor) -> Score:
    labels, predictions = torch.stack((labels_B, logits_BK.argmax(1))).tolist()
    confusion = Counter(zip(labels, predictions, strict=True))
    return Score(
        num_examples=len(labels),
        num_correct=sum(count for (label, prediction), count in confusion.items() if label == prediction),
        loss_sum=F.cross_entropy(logits_BK, labels_B, reduction="sum").item(),
        confusion=confusion,
    )


def logits(
    bound: BoundModel, photos: PhotoSet, batches: Iterable[int] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Yield logits [B, K] and labels [B] of the bound model, on its device.

    Args:
        bound: the model; must not train in the meantime.
        photos: evaluated in order.
        batches: indices among the `num_batches` fixed batches; by default all.
    """
    mean, std = bound.normalization.mean, bound.normalization.std
    for start in (batch * EVALUATION_BATCH for batch in (range(num_batches(photos)) if batches is None else batches)):
        chosen = np.arange(start, min(start + EVALUATION_BATCH, len(photos)))
        images, labels_B = gather(photos, chosen)
        bound.module.eval()
        with torch.inference_mode():
            is_features = images.dim() == 3
            inputs = (
                images[:, 0].to(bound.compute.device)
                if is_features
                else normalize(images, device=bound.compute.device, mean=mean, std=std)
            )
            logits_BK = bound.logits(inputs)
        yield logits_BK, labels_B.to(bound.compute.device)


def total(batches: Iterable[Score]) -> Score:
    """Sum the scores of batches, exactly and independent of their order."""
    scores = list(batches)
    confusion: Counter[tuple[int, int]] = Counter()
    for score in scores:
        confusion.update(score.confusion)
    return Score(
        num_examples=sum(score.num_examples for score in scores),
        num_correct=sum(score.num_correct for score in scores),
        loss_sum=math.fsum(score.loss_sum for score in scores),
        confusion=confusion,
    )
