"""Once the rounds are over: which model serves a store best. The client's side.

     1  make each candidate: trained alone, the global model, the personalized one
     2  mark each on the validation photos, and on test photos of what the store sells
     3  choose by the validation photos alone
     4  if the chosen one is made by a training of its own in the end: make it anew, with the validation photos, too
     5  keep it
     6  tell the server how the candidates do on the store's own mix, and which one is kept

A store has few validation photos, some dozens: chance alone may put any candidate in front there. So the one with the
most right answers is chosen (of equals, the one with the lower loss), unless the personalized one is there and what
speaks against it may well be chance: then that is chosen, which more photos have formed than the local one, and which
fits the store better than the global one. If one model alone names a photos right and the other alone b, then their
difference is a - b with a standard error of sqrt(a + b); more than 1.645 of these is what chance does one time in
twenty.

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
from fedshelf.data.dataset import PhotoSet
from fedshelf.personalization.alone import train_alone
from fedshelf.personalization.base import Personalization
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.photo_scores import PhotoScores, of_classes, reweighted_accuracy, score_photos
from fedshelf.training.trainer import Trainer

logger = logging.getLogger(__name__)

LEVEL = 1.645  # standard errors: the one-sided 5 % of a normal distribution
FIRST_MODEL = "first_model"
"""What the shared values [S] that the run began with are called in the broadcast that asks for a comparison."""
PREFERENCE = (Candidate.PERSONALIZED, Candidate.GLOBAL, Candidate.LOCAL)
"""What is kept where there is nothing to choose by: the first of these that there is."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelSelection:
    """What a store chooses with, beside what it trains with.

    Attributes:
        client_lr: learning rate of training alone, by round.
        test: test photos of any classes; None where there are none.
        keep: is given the workbench with the chosen model on it.
    """

    client_lr: Callable[[int], float]
    test: Callable[[], PhotoSet | None] = lambda: None
    save: Callable[[BoundModel, Comparison], None] = lambda bound, comparison: None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Tried:
    """A candidate: its values [P], its marks on the validation photos, its own-mix accuracy where that can be told."""

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
    """Make the candidates, choose, and keep the chosen one.

    Args:
        broadcast: the last global model, and the first.
        state: what stays at this store, as the last counted round left it.
        trainer: this store's.
        personalization: says what the candidates are.
        choosing: see there.

    Raises:
        RefusedError: the first model is missing.
        FedShelfError: no candidate could be trained, or the chosen one cannot be saved.
    """
    maker = _Maker.of(broadcast, state, trainer, personalization, model_selection)
    own = _joined(trainer.train, trainer.validation)
    test = model_selection.test()
    test = None if test is None else of_classes(test, own.labels)
    judges = test if test is not None and len(test) else None
    tried = _try_all(maker, judges, own.labels)
    best = choose({candidate: found.validation for candidate, found in tried.items()})
    if best is Candidate.PERSONALIZED and personalization.trains_at_last and len(trainer.validation):
        replace(maker, trainer=replace(trainer, train=own)).make(best)
        if judges is not None:  # without them, what held-out photos said stands: the model has seen those now
            tried[best] = _try(trainer, judges, own.labels)
    else:
        trainer.bound_model.params.vector.copy_(tried[best].values)
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
    """The candidate that serves best, judged by marks on the same validation photos; see the module's text."""
    if not all(len(marks) for marks in validation.values()):
        preferred = next(candidate for candidate in PREFERENCE if candidate in validation)
        logger.warning("without validation photos (--val-fraction) nothing is chosen: the %s model is kept", preferred)
        return preferred
    front = max(validation, key=lambda c: (int(validation[c].right.sum()), -float(validation[c].losses.sum())))
    own = validation.get(Candidate.PERSONALIZED)
    if own is not None and not _beyond_chance(validation[front], own):
        return Candidate.PERSONALIZED
    return front


def _beyond_chance(one: PhotoScores, other: PhotoScores) -> bool:
    """Whether `one` names more photos right than `other`, and by more than chance is likely to do."""
    gained, lost = int((one.right & ~other.right).sum()), int((other.right & ~one.right).sum())
    return gained - lost > LEVEL * math.sqrt(gained + lost)


def _worth_making(personalization: Personalization, *, has_photos: bool) -> tuple[Candidate, ...]:
    """All candidates; where no photo can judge them, the one that is kept."""
    if has_photos:
        return personalization.candidates
    return (next(candidate for candidate in PREFERENCE if candidate in personalization.candidates),)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Maker:
    """Leaves candidates on the trainer's bench. `first` [S] is the run's first model."""

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
    ) -> "_Maker":  # fmt: skip
        first = broadcast.auxiliary.get(FIRST_MODEL)
        if first is None or len(first) != trainer.bound_model.params.layout.num_shared:
            raise RefusedError("the run's first model did not come with the last one: another version of FedShelf?")
        return cls(
            broadcast=broadcast, first=first, state=state, trainer=trainer, personalization=personalization,
            model_selection=model_selection,
        )  # fmt: skip

    def make(self, candidate: Candidate) -> None:
        """Raises FedShelfError where training it diverges."""
        bound, key = self.trainer.bound_model, self.broadcast.key
        if candidate is Candidate.LOCAL:
            num_rounds = self.broadcast.num_rounds or key.round
            train_alone(
                self.trainer, self.first, run_id=key.run_id, num_rounds=num_rounds,
                client_lr=lambda number: self.model_selection.client_lr(math.ceil(number * key.round / num_rounds)),
            )  # fmt: skip
            return
        bound.load(self.broadcast.params)
        if candidate is Candidate.PERSONALIZED:
            self.personalization.apply(bound, self.state)
            self.personalization.finalize(self.broadcast, self.trainer)


def _try_all(maker: _Maker, test: PhotoSet | None, own_labels: NDArray[np.int64]) -> dict[Candidate, _Tried]:
    """All candidates that can be made.

    Raises:
        FedShelfError: there are none.
    """
    trainer, tried = maker.trainer, {}
    for candidate in _worth_making(maker.personalization, has_photos=test is not None or len(trainer.validation) > 0):
        try:
            maker.make(candidate)
        except FedShelfError as error:  # a model that cannot be trained is none to choose
            logger.warning("there is no %s model to choose: %s", candidate.value, error)
        else:
            tried[candidate] = _try(trainer, test, own_labels)
    if not tried:
        raise FedShelfError("none of the models to choose among could be trained: lower --client-lr or --finetune-lr")
    return tried


def _try(trainer: Trainer, test: PhotoSet | None, own_labels: NDArray[np.int64]) -> _Tried:
    """What the model on the bench is worth. Validation photos have the store's own mix as they are."""
    bound = trainer.bound_model
    validation = score_photos(bound, trainer.validation)
    accuracy = validation.accuracy
    if test is not None:
        accuracy = reweighted_accuracy(score_photos(bound, test).right, test.labels, own_labels)
    return _Tried(values=bound.params.vector.clone(), validation=validation, accuracy=accuracy)


def _joined(one: PhotoSet, other: PhotoSet) -> PhotoSet:
    return PhotoSet(np.concatenate([one.images, other.images]), np.concatenate([one.labels, other.labels]))
