"""Own-mix accuracy by hand, and marks photo by photo."""

import numpy as np
import pytest
import torch

from fedshelf.data.photo_set import PhotoSet
from fedshelf.training.photo_scores import of_classes, reweighted_accuracy, score_photos
from fedshelf.training.trainer import EVALUATION_BATCH, evaluate, logits
from tests.worlds import bound_model, linear, photos, with_batch_norm


def test_own_mix_accuracy_by_hand() -> None:
    """3/4 of the store's photos show class 0 and 1/4 class 2; of class 0 half is right, of class 2 all."""
    own = np.array([0, 0, 0, 2])
    labels = np.array([0, 0, 1, 2, 2, 2])
    right = np.array([True, False, True, True, True, True])
    assert reweighted_accuracy(right, labels, own) == pytest.approx(0.75 * 0.5 + 0.25 * 1.0)


def test_a_product_without_test_photos_is_left_out_and_the_others_weigh_more() -> None:
    own = np.array([0, 0, 1, 5, 5, 5, 5, 5])  # nobody has photographed class 5 for the test
    labels = np.array([0, 0, 1, 3])
    right = np.array([True, True, False, True])
    assert reweighted_accuracy(right, labels, own) == pytest.approx(2 / 3)


def test_products_that_the_store_does_not_sell_are_no_matter() -> None:
    own, labels = np.array([1, 1]), np.array([1, 1, 4, 4, 4])
    right = np.array([True, False, True, True, True])
    assert reweighted_accuracy(right, labels, own) == 0.5


def test_without_a_common_class_there_is_no_accuracy() -> None:
    none = np.array([], dtype=np.int64)
    assert reweighted_accuracy(np.array([True]), np.array([3]), np.array([1])) is None
    assert reweighted_accuracy(np.array([], dtype=np.bool_), none, np.array([1])) is None
    assert reweighted_accuracy(np.array([True]), np.array([3]), none) is None


def test_accuracy_on_photos_of_the_stores_own_mix_is_the_plain_one() -> None:
    labels = np.array([0, 0, 0, 1, 2, 2])
    right = np.array([True, False, False, True, True, False])
    assert reweighted_accuracy(right, labels, np.tile(labels, 3)) == pytest.approx(right.mean())


def test_of_the_test_photos_those_of_sold_products_are_chosen_in_order() -> None:
    given = PhotoSet(np.arange(5, dtype=np.uint8)[:, None, None, None], np.array([2, 0, 1, 2, 0]))
    found = of_classes(given, np.array([2, 7, 2]))
    assert found.labels.tolist() == [2, 2]
    assert found.images[:, 0, 0, 0].tolist() == [0, 3]


@pytest.mark.parametrize("make", [linear, with_batch_norm])
def test_marks_add_up_to_the_score(make: type) -> None:
    bench, given = bound_model(make()), photos(3, EVALUATION_BATCH + 7)
    marks, score = score_photos(bench, given), evaluate(bench, given)
    assert len(marks) == score.num_examples == EVALUATION_BATCH + 7
    assert marks.right.sum() == score.num_correct
    assert marks.accuracy == score.accuracy
    assert marks.losses.sum() == pytest.approx(score.loss_sum, rel=1e-5)


def test_each_photo_has_its_own_mark() -> None:
    bench, given = bound_model(), photos(3, 9)
    marks = score_photos(bench, given)
    ((logits_BK, labels_B),) = logits(bench, given)
    expected = [int(torch.argmax(row)) == int(label) for row, label in zip(logits_BK, labels_B, strict=True)]
    assert marks.right.tolist() == expected
    assert 0 < sum(expected) < 9, "else nothing was shown"


def test_no_photos_have_no_accuracy() -> None:
    marks = score_photos(bound_model(), photos(1, 0))
    assert len(marks) == 0
    assert marks.accuracy is None


def test_marking_moves_neither_values_nor_statistics() -> None:
    bench = bound_model(with_batch_norm())
    before = bench.params.vector.clone()
    bench.module.train()
    score_photos(bench, photos(1, 5))
    assert torch.equal(bench.params.vector, before)
