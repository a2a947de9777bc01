"""Model selection after the last round, at the client: which model serves the store best.

     1  make each candidate: the local, the global and the personalized model
     2  score each on the validation photos, and on test photos of the store's classes
     3  choose by the validation photos only
     4  if the chosen one ends with its own training: retrain it, including the validation photos
     5  save it
     6  report the candidates' accuracy under the store's class distribution, and the choice

A store has few validation photos, some dozens, so that any candidate may lead by chance. The one with the most correct
predictions is chosen (of equals, the one with the lower loss), unless there is a personalized one whose deficit may
well be chance: then that is chosen, because it is trained on more photos than the local one, and fits the store better
than the global one. If a photos are correct only under one model, and b only under the other, their difference is a - b
with a standard error of sqrt(a + b); more than 1.645 of these occur by chance one time in twenty.

Source: McNemar 1947, "Note on the sampling error of the difference between correlated proportions or percentages".

Shapes: S shared values, P all values.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedshelf.core.choices import Candidate
from fedshelf.core.errors import FedShelfError, RefusedError
from fedshelf.core.messages import Broadcast, Comparison
from fedshelf.core.state import ClientState
from fedshelf.data.photo_set import PhotoSet
from fedshelf.personalization.alone import ClosedForm, train_alone
from fedshelf.personalization.base import Personalization
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.photo_scores import PhotoScores, of_classes, reweighted_accuracy, score_photos
from fedshelf.training.trainer import Trainer

logger = logging.getLogger(__name__)

LEVEL = 1.645  # standard errors: the one-sided 5 % of a normal distribution
FIRST_MODEL = "first_model"
"""Name of the run's initial shared values [S] in the broadcast that requests a comparison."""
PREFERENCE = (Candidate.PERSONALIZED, Candidate.GLOBAL, Candidate.LOCAL)
"""Preferences without any photos to choose by: the first available one is kept."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelSelection:
    """What a store needs to select a model, in addition to its trainer.

    Attributes:
        client_lr: learning rate of local-only training, by round.
        test: returns test photos of any classes; None if there are none.
        save: saves the bound model with the chosen model's values.
        closed_form: computes the output layer of local-only training, if the run computes its own in closed form.
    """

    client_lr: Callable[[int], float]
    test: Callable[[], PhotoSet | None] = lambda: None
    save: Callable[[BoundModel, Comparison], None] = lambda bound, comparison: None
    closed_form: ClosedForm | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _ScoredCandidate:
    """A candidate and its scores.

    Attributes:
        values: its values [P].
        validation: scores on the validation photos.
        accuracy: accuracy under the store's class distribution; None if unknown.
    """

    values: Tensor
    validation: PhotoScores
    accuracy: float | None


def compare(
    broadcast: Broadcast,
    state: ClientState,
    *,
    trainer: Trainer,
    personalization: Personalization,
    model_selection: ModelSelection,
) -> Comparison:
    """Make the candidates, choose one, and save it.

    Args:
        broadcast: the last global model, and the first.
        state: the client's state after the last counted round.
        trainer: the store's trainer.
        personalization: defines the candidates.
        model_selection: learning rate, test photos and where to save.

    Raises:
        RefusedError: the first model is missing.
        FedShelfError: no candidate could be trained, or the chosen one cannot be saved.
    """
    maker = _CandidateBuilder.of(broadcast, state, trainer, personalization, model_selection)
    own = _joined(trainer.train, trainer.validation)
    test = model_selection.test()
    test = None if test is None else of_classes(test, own.labels)
    judges = test if test is not None and len(test) else None
    tried = _try_all(maker, judges, own.labels)
    best = choose({candidate: found.validation for candidate, found in tried.items()})
    if best is Candidate.PERSONALIZED and personalization.trains_at_last and len(trainer.validation):
        replace(maker, trainer=replace(trainer, train=own)).make(best)
        if (
            judges is not None
        ):  # without them, the held-out scores stand: the model has now been trained on those photos
            tried[best] = _try(trainer, judges, own.labels)
    else:
        trainer.bound_model.params.changing.copy_(tried[best].values)
    comparison = Comparison(
        key=broadcast.key,
        best=best,
        accuracies={candidate: found.accuracy for candidate, found in tried.items() if found.accuracy is not None},
        on_test=judges is not None,
        num_validation=len(trainer.validation),
    )
    model_selection.save(trainer.bound_model, comparison)
    return comparison


def choose(validation: Mapping[Candidate, PhotoScores]) -> Candidate:
    """Choose a candidate by scores on the same validation photos (see the module's docstring)."""
    if not all(len(marks) for marks in validation.values()):
        preferred = next(candidate for candidate in PREFERENCE if candidate in validation)
        logger.warning("without validation photos (--val-fraction) nothing is chosen: the %s model is kept", preferred)
        return preferred
    front = max(validation, key=lambda c: (int(validation[c].right.sum()), -float(validation[c].losses.sum())))
    own = validation.get(Candidate.PERSONALIZED)
    if own is not None and not _is_significantly_better(validation[front], own):
        return Candidate.PERSONALIZED
    return front


def _is_significantly_better(one: PhotoScores, other: PhotoScores) -> bool:
    """Whether `one` has more correct predictions than `other`, significantly."""
    gained, lost = int((one.right & ~other.right).sum()), int((other.right & ~one.right).sum())
    return gained - lost > LEVEL * math.sqrt(gained + lost)


def _needed_candidates(personalization: Personalization, *, has_photos: bool) -> tuple[Candidate, ...]:
    """All candidates; without any photos to evaluate them, only the one that is kept."""
    if has_photos:
        return personalization.candidates
    return (next(candidate for candidate in PREFERENCE if candidate in personalization.candidates),)


@dataclass(frozen=True, kw_only=True, eq=False)
class _CandidateBuilder:
    """Makes candidates on the trainer's bound model.

    Attributes:
        broadcast: holds the last global model.
        first: the run's first model [S].
        state: the client's state.
        trainer: the store's trainer.
        personalization: defines the candidates.
        model_selection: learning rate and test photos.
    """

    broadcast: Broadcast
    first: Tensor
    state: ClientState
    trainer: Trainer
    personalization: Personalization
    model_selection: ModelSelection

    @classmethod
    def of(
        cls, broadcast: Broadcast, state: ClientState, trainer: Trainer, personalization: Personalization,
        model_selection: ModelSelection,
    ) -> "_CandidateBuilder":  # fmt: skip
        first = broadcast.auxiliary.get(FIRST_MODEL)
        if first is None or len(first) != trainer.bound_model.params.layout.num_shared:
            raise RefusedError("the run's first model did not come with the last one: another version of FedShelf?")
        return cls(
            broadcast=broadcast, first=first, state=state, trainer=trainer, personalization=personalization,
            model_selection=model_selection,
        )  # fmt: skip

    def make(self, candidate: Candidate) -> None:
        """Make a candidate.

        Raises:
            FedShelfError: its training diverged.
        """
        bound, key = self.trainer.bound_model, self.broadcast.key
        if candidate is Candidate.LOCAL:
            num_rounds = self.broadcast.num_rounds or key.round
            train_alone(
                self.trainer, self.first, run_id=key.run_id, num_rounds=num_rounds,
                client_lr=lambda number: self.model_selection.client_lr(math.ceil(number * key.round / num_rounds)),
                closed_form=self.model_selection.closed_form,
            )  # fmt: skip
            return
        bound.load(self.broadcast.params)
        if candidate is Candidate.GLOBAL:
            self.personalization.without_personal(bound)
        else:
            self.personalization.apply(bound, self.state)
            self.personalization.finalize(self.broadcast, self.trainer)


def _try_all(
    maker: _CandidateBuilder, test: PhotoSet | None, own_labels: NDArray[np.int64]
) -> dict[Candidate, _ScoredCandidate]:
    """Make and score all candidates.

    Raises:
        FedShelfError: no candidate could be made.
    """
    trainer, tried = maker.trainer, {}
    for candidate in _needed_candidates(
        maker.personalization, has_photos=test is not None or len(trainer.validation) > 0
    ):
        try:
            maker.make(candidate)
        except FedShelfError as error:  # skip models that cannot be trained
            logger.warning("there is no %s model to choose: %s", candidate.value, error)
        else:
            tried[candidate] = _try(trainer, test, own_labels)
    if not tried:
        raise FedShelfError("none of the models to choose among could be trained: lower --client-lr or --finetune-lr")
    return tried


def _try(trainer: Trainer, test: PhotoSet | None, own_labels: NDArray[np.int64]) -> _ScoredCandidate:
    """Score the trainer's bound model. Validation photos already have the store's class distribution."""
    bound = trainer.bound_model
    validation = score_photos(bound, trainer.validation)
    accuracy = validation.accuracy
    if test is not None:
        accuracy = reweighted_accuracy(score_photos(bound, test).right, test.labels, own_labels)
    return _ScoredCandidate(values=bound.params.changing.clone(), validation=validation, accuracy=accuracy)


def _joined(one: PhotoSet, other: PhotoSet) -> PhotoSet:
    for_teacher = None
    if one.teacher_images is not None and other.teacher_images is not None:
        for_teacher = np.concatenate([one.teacher_images, other.teacher_images])
    images, labels = (np.concatenate(parts) for parts in ((one.images, other.images), (one.labels, other.labels)))
    return PhotoSet(images, labels, for_teacher)
