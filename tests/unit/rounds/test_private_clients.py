"""What a client that adds noise answers to a server that asks for more than the noise covers."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from fedshelf.algorithms.fedavg import FedAvg
from fedshelf.core.choices import Candidate
from fedshelf.core.errors import TrainingError
from fedshelf.core.messages import (
    AUXILIARY,
    PARAMS,
    Broadcast,
    ClientMessage,
    Comparison,
    Failure,
    Mechanism,
    Purpose,
    Ready,
    Setup,
    TaskKey,
    Upload,
)
from fedshelf.core.ports import ReleaseTerms
from fedshelf.personalization.base import NONE, Personalization
from fedshelf.personalization.model_selection import FIRST_MODEL, ModelSelection
from fedshelf.privacy.accounting import SampledGaussian, as_json, compose
from fedshelf.privacy.client_dp import ClippedAtClient
from fedshelf.privacy.dp_sgd import PrivateTraining, poisson
from fedshelf.privacy.policy_tables import Metrics
from fedshelf.privacy.withholding import withhold
from fedshelf.rounds.client import Client, Work
from fedshelf.training.loop import LocalRun
from fedshelf.training.trainer import Trainer
from tests.fakes import MemoryClientStates
from tests.worlds import bound_model, trainer

RUN = "r"


def noise(multiplier: float) -> Mechanism:
    return Mechanism(noise_multiplier=multiplier, sampling_rate=0.5, steps=2)


def private(multiplier: float, plain: Trainer | None = None) -> Trainer:
    training = PrivateTraining(noise_multiplier=multiplier, clip_norm=1.0)
    return replace(plain or trainer(), run=training, draw=poisson, is_private=True)


@dataclass
class Store:
    """A client whose noise follows from the setup's configuration ("" for none), and the terms of its replies."""

    metrics: Metrics = Metrics()  # noqa: RUF009  frozen
    training: Callable[[LocalRun], float] | None = None
    clip: ClippedAtClient | None = None
    terms: list[ReleaseTerms] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.client = Client(
            prepare=self._prepare, states=MemoryClientStates(),
            withhold=lambda reply: withhold(reply, self.metrics),
            on_reply=lambda reply, terms: self.terms.append(terms),
        )  # fmt: skip

    def _prepare(self, setup: Setup) -> Work:
        plain = trainer()
        plain = plain if self.training is None else replace(plain, run=self.training)
        ready = Ready(
            run_id=RUN, layout_digest="", catalogue_digest="", config_digest="", num_train=1, num_validation=0,
            num_left_out=0,
        )  # fmt: skip
        multiplier = float(setup.config or 0)
        return Work(
            algorithm=FedAvg(), trainer=private(multiplier) if multiplier else plain, ready=ready, local_trainer=plain,
            mechanism=noise(multiplier) if multiplier else None, clip=self.clip,
            personalization=NONE if self.training is None else Personalization(candidates=(Candidate.LOCAL,)),
            model_selection=ModelSelection(client_lr=lambda number: 0.1),
        )  # fmt: skip

    def set_up(self, multiplier: float | None) -> None:
        setup = Setup(run_id=RUN, config="" if multiplier is None else str(multiplier), catalogue="", layout_digest="")
        assert isinstance(self.client.handle(setup), Ready)

    def ask(self, purpose: Purpose = Purpose.TRAIN, **values: Any) -> ClientMessage:
        shared = bound_model().params.shared.clone()
        vectors = {PARAMS: shared, AUXILIARY + FIRST_MODEL: shared}
        key = TaskKey(run_id=RUN, round=1, attempt=0)
        return self.client.handle(Broadcast(key=key, purpose=purpose, client_lr=0.1, vectors=vectors, **values))


@pytest.mark.parametrize("num_steps", [1, 3, 1000])
def test_a_task_with_steps_of_its_own_is_refused_because_they_are_not_accounted_for(num_steps: int) -> None:
    store = Store()
    store.set_up(1.0)
    answer = store.ask(num_steps=num_steps)
    assert isinstance(answer, Failure)
    assert "the noise is calibrated to the configured epochs" in answer.reason
    store.set_up(None)
    assert isinstance(store.ask(num_steps=num_steps), Upload)


@pytest.mark.parametrize("before", [None, 0.5])
def test_an_upload_that_was_kept_is_accounted_for_with_its_own_noise(before: float | None) -> None:
    """A server that cuts the line before an upload is sent, and sets the run up with more noise, gains nothing."""
    store = Store()
    store.set_up(before)
    first = store.ask()
    store.set_up(100.0)
    again = store.ask()
    assert isinstance(first, Upload)
    assert isinstance(again, Upload)
    assert torch.equal(first.delta, again.delta)
    assert store.terms[-1].mechanism == (None if before is None else as_json(noise(before)))


def test_noise_from_which_the_number_of_photos_follows_is_withheld_with_it() -> None:
    store = Store(metrics=Metrics(example_counts=False))
    store.set_up(1.0)
    answer = store.ask()
    assert isinstance(answer, Upload)
    assert answer.mechanism is None
    assert store.terms[-1].mechanism == as_json(noise(1.0))  # the ledger knows


def test_an_upload_with_noise_tells_neither_loss_nor_duration() -> None:
    store = Store()
    store.set_up(1.0)
    answer = store.ask()
    assert isinstance(answer, Upload)
    assert (answer.train_loss, answer.seconds) == (None, None)


def fails(local_run: LocalRun) -> float:
    raise TrainingError("training diverged")


@pytest.mark.parametrize("training", [None, fails])
def test_a_comparison_tells_nothing_and_costs_nothing(training: Callable[[LocalRun], float] | None) -> None:
    """Whether a model could be trained without noise depends on photos, too."""
    store = Store(training=training)
    store.set_up(1.0)
    answer = store.ask(Purpose.COMPARE)
    assert isinstance(answer, Comparison)
    assert (answer.best, answer.accuracies, answer.on_test, answer.num_validation) == (None, {}, False, None)
    assert compose([SampledGaussian.from_json(store.terms[-1].mechanism)], 1e-5).epsilon == 0


def test_a_comparison_made_without_noise_is_not_kept_for_a_setup_with_noise() -> None:
    store = Store()
    store.set_up(None)
    told = store.ask(Purpose.COMPARE)
    store.set_up(1.0)
    answer = store.ask(Purpose.COMPARE)
    assert isinstance(told, Comparison)
    assert isinstance(answer, Comparison)
    assert told.accuracies
    assert not answer.accuracies


def test_a_store_that_adds_a_share_of_the_noise_answers_with_nothing_else_from_photos() -> None:
    for noise_at, tells in (("stores", False), ("server", True)):
        store = Store(clip=ClippedAtClient(clip_norm="adaptive", noise_at=noise_at))  # type: ignore[arg-type]
        store.set_up(None)
        evaluated = store.ask(Purpose.EVALUATE)
        assert isinstance(evaluated, Failure)  # the task has something to choose among, which FedAvg has not
        assert ("have no noise" in evaluated.reason) != tells
        compared = store.ask(Purpose.COMPARE)
        assert isinstance(compared, Comparison)
        assert bool(compared.accuracies) == tells
        refused = store.ask(Purpose.TRAIN)
        assert isinstance(refused, Failure)
        assert "the task's clip norm is missing" in refused.reason
