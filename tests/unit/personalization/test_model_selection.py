"""Which model a store keeps: the rule, and what a client makes of it."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fedshelf.core.choices import Candidate
from fedshelf.core.errors import FedShelfError, RefusedError
from fedshelf.core.messages import Broadcast, Comparison, Purpose, TaskKey, auxiliary_vectors
from fedshelf.core.state import ClientState
from fedshelf.data.photo_set import PhotoSet
from fedshelf.personalization.base import PERSONAL, Personalization
from fedshelf.personalization.model_selection import FIRST_MODEL, ModelSelection, choose, compare
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.photo_scores import PhotoScores, of_classes, reweighted_accuracy, score_photos
from fedshelf.training.trainer import Trainer
from tests.worlds import bound_model, personalization, photos, trainer, with_batch_norm

LOCAL, GLOBAL, PERSONALIZED = Candidate.LOCAL, Candidate.GLOBAL, Candidate.PERSONALIZED
ROUNDS = 3


def marks(right: str, loss: float = 1.0) -> PhotoScores:
    """`right` has an x for every photo that was named right."""
    flags = np.array([character == "x" for character in right])
    return PhotoScores(right=flags, losses=np.full(len(flags), loss))


@pytest.mark.parametrize(
    ("local", "personalized", "expected"),
    [
        ("xxxx....", "xxxx....", PERSONALIZED),
        ("xxxxxx..", "xxxx....", PERSONALIZED),  # two photos more, 1.41 standard errors
        ("xxxxxxx.", "xxxx....", LOCAL),  # three, 1.73 standard errors
        ("xxxxxxx.", "xxx....x", PERSONALIZED),  # 4 gained, 1 lost: 1.34 standard errors
        ("xxxxxxx.", "xx.....x", PERSONALIZED),  # 5 gained, 1 lost: 1.63
        ("xxxxxxx.", "x......x", LOCAL),  # 6 gained, 1 lost: 1.89
        ("........", "xxxx....", PERSONALIZED),
    ],
)
def test_another_model_must_be_better_than_the_personalized_one_by_more_than_chance(
    local: str, personalized: str, expected: Candidate
) -> None:
    assert choose({LOCAL: marks(local), PERSONALIZED: marks(personalized)}) is expected
    assert choose({PERSONALIZED: marks(personalized), LOCAL: marks(local)}) is expected


def test_without_a_personalized_model_the_most_right_answers_win_and_of_equals_the_lower_loss() -> None:
    assert choose({LOCAL: marks("xxx."), GLOBAL: marks("xx..")}) is LOCAL
    assert choose({LOCAL: marks("xx.."), GLOBAL: marks("xxx.")}) is GLOBAL
    assert choose({LOCAL: marks("xx..", 1.0), GLOBAL: marks("..xx", 0.9)}) is GLOBAL
    assert choose({LOCAL: marks("xx..", 0.9), GLOBAL: marks("..xx", 1.0)}) is LOCAL


def test_the_front_runner_is_found_among_all_and_compared_with_the_personalized_one() -> None:
    found = {LOCAL: marks("xxxxxx.."), GLOBAL: marks("xxxxxxx."), PERSONALIZED: marks("xxx.....")}
    assert choose(found) is GLOBAL


def test_without_validation_photos_the_documented_order_decides(caplog: pytest.LogCaptureFixture) -> None:
    nothing = marks("")
    with caplog.at_level(logging.WARNING):
        assert choose({LOCAL: nothing, GLOBAL: nothing, PERSONALIZED: nothing}) is PERSONALIZED
        assert choose({LOCAL: nothing, GLOBAL: nothing}) is GLOBAL
    assert "--val-fraction" in caplog.text
    assert "global model is kept" in caplog.text


class Store:
    """One store at the end of a run, with a global model that differs from the first one."""

    def __init__(self, method: str = "finetune", *, validation: int = 4) -> None:
        self.personalization: Personalization = personalization(method)
        self.bench = bound_model(with_batch_norm(), personalization=self.personalization)
        self.first = self.bench.params.shared.clone()
        self.last = self.first + torch.linspace(-0.1, 0.1, len(self.first)).abs()
        own = trainer(bench=self.bench, train=photos(1, 12))
        self.trainer: Trainer = replace(own, validation=photos(2, validation), phases=self.personalization.phases)
        self.kept: list[tuple[Comparison, Tensor]] = []
        self.test = photos(5, 30)
        self.model_selection = ModelSelection(
            client_lr=lambda number: 0.1 / number, test=lambda: self.test, save=self._keep
        )

    def _keep(self, bench: BoundModel, comparison: Comparison) -> None:
        self.kept.append((comparison, bench.params.vector.clone()))

    @property
    def broadcast(self) -> Broadcast:
        return Broadcast(
            key=TaskKey(run_id="r", round=ROUNDS, attempt=1),
            purpose=Purpose.COMPARE,
            vectors={"params": self.last, **auxiliary_vectors({FIRST_MODEL: self.first})},
            client_lr=0.0,
        )

    def compare(self, state: ClientState | None = None, broadcast: Broadcast | None = None) -> Comparison:
        return compare(
            broadcast or self.broadcast, state or ClientState(), trainer=self.trainer,
            personalization=self.personalization, model_selection=self.model_selection,
        )  # fmt: skip

    def accuracy(self) -> float | None:
        """Own-mix accuracy of the model on the bench."""
        own = np.concatenate([self.trainer.train.labels, self.trainer.validation.labels])
        test = of_classes(self.test, own)
        return reweighted_accuracy(score_photos(self.bench, test).right, test.labels, own)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("none", {LOCAL, GLOBAL}),
        ("fedbn", {LOCAL, PERSONALIZED}),
        ("fedper", {LOCAL, PERSONALIZED}),
        ("fedrep", {LOCAL, PERSONALIZED}),
        ("ditto", {LOCAL, GLOBAL, PERSONALIZED}),
        ("finetune", {LOCAL, GLOBAL, PERSONALIZED}),
    ],
)
def test_a_store_chooses_among_the_models_that_there_are(method: str, expected: set[Candidate]) -> None:
    store = Store(method)
    comparison = store.compare()
    assert set(comparison.accuracies) == expected
    assert comparison.best in expected
    assert comparison.on_test
    assert comparison.num_validation == 4
    assert [found for found, _ in store.kept] == [comparison]


@pytest.mark.parametrize("method", ["none", "fedper", "finetune"])
def test_the_reported_accuracy_is_that_of_the_very_model_that_is_kept(method: str) -> None:
    store = Store(method)
    comparison = store.compare()
    ((_, values),) = store.kept
    assert torch.equal(store.bench.params.vector, values)
    store.bench.params.vector.copy_(values)
    assert comparison.best is not None
    assert store.accuracy() == comparison.accuracies[comparison.best]


def joined(*sets: PhotoSet) -> PhotoSet:
    return PhotoSet(np.concatenate([each.images for each in sets]), np.concatenate([each.labels for each in sets]))


def test_a_fine_tuned_model_that_was_chosen_is_made_once_more_of_all_photos() -> None:
    store = Store("finetune")
    comparison = store.compare()
    assert comparison.best is PERSONALIZED
    ((_, kept),) = store.kept
    for photos_, same in ((joined(store.trainer.train, store.trainer.validation), True), (store.trainer.train, False)):
        store.bench.load(store.last)
        store.personalization.finalize(store.broadcast, replace(store.trainer, train=photos_))
        assert torch.equal(kept, store.bench.params.vector) == same


def test_what_is_not_trained_at_last_is_kept_as_the_rounds_left_it() -> None:
    store = Store("fedbn")
    store.model_selection = replace(store.model_selection, client_lr=lambda number: 1e30)  # there is no local one
    store.compare()
    ((_, kept),) = store.kept
    assert torch.equal(kept[: len(store.last)], store.last)


def test_the_global_candidate_is_the_last_model_as_it_came() -> None:
    store = Store("finetune")
    found = store.compare().accuracies
    store.bench.load(store.last)
    assert found[GLOBAL] == store.accuracy()


def test_personal_tensors_are_part_of_the_personalized_model_and_of_no_other() -> None:
    store = Store("fedper")
    own = torch.randn(store.bench.params.personal.shape, generator=torch.Generator().manual_seed(1))
    comparison = store.compare(ClientState(personalization={PERSONAL: own}))
    store.bench.load(store.last)
    store.bench.params.personal.copy_(own)
    assert comparison.accuracies[PERSONALIZED] == store.accuracy()
    without = Store("fedper").compare()
    assert without.accuracies[LOCAL] == comparison.accuracies[LOCAL]


def test_the_choice_does_not_look_at_test_photos() -> None:
    """Whatever they show: the same model is kept."""
    kept = []
    for seed in (5, 6, 7):
        store = Store()
        store.test = photos(seed, 30)
        kept.append((store.compare().best, store.kept[0][1]))
    assert {best for best, _ in kept} == {kept[0][0]}
    assert all(torch.equal(values, kept[0][1]) for _, values in kept)


def test_without_test_photos_the_report_is_on_validation_photos_and_says_so() -> None:
    store = Store()
    store.model_selection = replace(store.model_selection, test=lambda: None)
    comparison = store.compare()
    assert not comparison.on_test
    assert comparison.best is PERSONALIZED
    store.bench.load(store.last)
    store.personalization.finalize(store.broadcast, store.trainer)
    held_out = score_photos(store.bench, store.trainer.validation).accuracy
    assert comparison.accuracies[PERSONALIZED] == held_out, "of the model that had not seen them"


def test_test_photos_of_none_of_the_stores_products_are_as_good_as_none() -> None:
    store = Store()
    store.test = replace(store.test, labels=store.test.labels + 100)
    assert not store.compare().on_test


def test_without_any_photos_to_judge_by_only_the_kept_model_is_made() -> None:
    store = Store(validation=0)
    store.model_selection = replace(store.model_selection, test=lambda: None)
    rounds: list[int] = []

    def client_lr(number: int) -> float:
        rounds.append(number)
        return 0.1

    store.model_selection = replace(store.model_selection, client_lr=client_lr)
    comparison = store.compare()
    assert (comparison.best, dict(comparison.accuracies), comparison.num_validation) == (PERSONALIZED, {}, 0)
    assert rounds == [], "nothing was trained alone"
    assert len(store.kept) == 1


@pytest.mark.parametrize(("num_rounds", "expected"), [(None, [1, 2, 3]), (2, [2, 3]), (6, [1, 1, 2, 2, 3, 3])])
def test_a_model_alone_goes_through_the_rates_of_the_run_in_as_many_rounds_as_it_is_given(
    num_rounds: int | None, expected: list[int]
) -> None:
    store = Store()
    rates: list[int] = []

    def client_lr(number: int) -> float:
        rates.append(number)
        return 0.1

    store.model_selection = replace(store.model_selection, client_lr=client_lr)
    store.compare(broadcast=replace(store.broadcast, num_rounds=num_rounds))
    assert rates == expected


def test_a_model_that_diverges_is_none_to_choose(caplog: pytest.LogCaptureFixture) -> None:
    store = Store()
    store.model_selection = replace(store.model_selection, client_lr=lambda number: 1e30)
    with caplog.at_level(logging.WARNING):
        comparison = store.compare()
    assert set(comparison.accuracies) == {GLOBAL, PERSONALIZED}
    assert "no local model to choose: training diverged" in caplog.text


def test_where_nothing_can_be_trained_the_client_says_so() -> None:
    store = Store("fedbn")
    store.last = store.first * float("nan")
    store.model_selection = replace(store.model_selection, client_lr=lambda number: 1e30)
    comparison = store.compare()  # the personalized model is useless, but it needs no training
    assert comparison.best is PERSONALIZED
    tuned = Store()
    tuned.personalization = replace(personalization("finetune"), candidates=(LOCAL,))
    tuned.model_selection = replace(tuned.model_selection, client_lr=lambda number: 1e30)
    with pytest.raises(FedShelfError, match=r"none of the models .* lower --client-lr"):
        tuned.compare()


@pytest.mark.parametrize("first", [{}, {FIRST_MODEL: torch.zeros(3)}], ids=["missing", "of another size"])
def test_without_the_runs_first_model_the_task_is_refused(first: dict[str, Tensor]) -> None:
    store = Store()
    with pytest.raises(RefusedError, match="first model"):
        store.compare(broadcast=replace(store.broadcast, vectors={"params": store.last, **auxiliary_vectors(first)}))
    assert store.kept == []
