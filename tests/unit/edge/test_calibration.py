"""Temperature and threshold, on photos whose best values are known."""

import numpy as np
import pytest

from fedshelf.edge.making.calibration import best_temperature, best_threshold, softmax


def test_the_temperature_is_that_with_which_labels_were_drawn() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (20_000, 5))
    labels = np.array([rng.choice(5, p=row) for row in softmax(logits)])
    for temperature in (0.2, 1.0, 3.0):
        assert best_temperature(temperature * logits, labels) == pytest.approx(temperature, rel=0.03)


def test_the_temperature_minimizes_the_loss() -> None:
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(0, 3, (400, 4)), rng.integers(0, 4, 400)
    labels[:250] = logits[:250].argmax(1)

    def loss(temperature: float) -> float:
        return float(-np.log(softmax(logits / temperature)[np.arange(400), labels]).mean())

    best = best_temperature(logits, labels)
    assert loss(best) < min(loss(0.98 * best), loss(1.02 * best))


def test_photos_that_are_all_right_give_a_finite_temperature() -> None:
    assert 1 / 1024 <= best_temperature(3 * np.eye(3), np.arange(3)) < 0.1
    assert 1 / 1024 <= best_temperature(1e-6 * np.eye(3), np.arange(3)) < 0.002
    assert best_temperature(-3 * np.eye(3), np.arange(3)) <= 1024


def test_the_threshold_is_the_lowest_with_the_precision() -> None:
    confidences = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    correct = np.array([True, True, False, True, False])
    found = best_threshold(confidences, correct, precision=0.75)
    assert (found.value, found.sure, found.precision) == (0.6, 0.8, 0.75)
    found = best_threshold(confidences, correct, precision=1.0)
    assert (found.value, found.sure, found.precision) == (0.8, 0.4, 1.0)


def test_equal_probabilities_are_sure_together() -> None:
    found = best_threshold(np.array([0.9, 0.7, 0.7]), np.array([True, True, False]), precision=0.9)
    assert found.value == 0.9
    assert found.sure == pytest.approx(1 / 3)


def test_without_a_threshold_of_that_precision_nothing_is_sure() -> None:
    found = best_threshold(np.array([0.9, 0.7]), np.array([False, True]), precision=0.9)
    assert (found.value, found.sure, found.precision) == (1.0, 0.0, None)
