"""Calibrates a model's probabilities on labeled photos, and chooses from which probability on an answer is sure.

The temperature T > 0 minimizes the mean negative log-likelihood of softmax(logits / T). That is a convex function of
1/T, so its minimum is found by bisection of the derivative. It changes no answer.

Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4.2.

Shapes: N photos, K products.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

UNCALIBRATED_THRESHOLD = 0.5
DEFAULT_PRECISION = 0.95
_STEPS = 60
_MOST = 2.0**10  # T is at least 1 / _MOST and at most _MOST


@dataclass(frozen=True, kw_only=True, slots=True)
class Threshold:
    """From which probability on an answer is sure.

    Attributes:
        value: the threshold; 1 if no choice has the precision.
        sure: share of the photos with a sure answer.
        precision: share of the sure answers that are right; None without any.
    """

    value: float
    sure: float
    precision: float | None


def softmax(logits_NK: NDArray[np.float64]) -> NDArray[np.float64]:
    """The probabilities [N, K]."""
    powers_NK = np.exp(logits_NK - logits_NK.max(1, keepdims=True))
    probabilities_NK: NDArray[np.float64] = powers_NK / powers_NK.sum(1, keepdims=True)
    return probabilities_NK


def best_temperature(logits_NK: NDArray[np.float64], labels_N: NDArray[np.int64]) -> float:
    """The temperature that minimizes the negative log-likelihood.

    Args:
        logits_NK: the logits.
        labels_N: the right products.

    Returns:
        The temperature, in [1/1024, 1024]: of photos that are all right, the likelihood only grows as it falls.
    """
    right_N = logits_NK[np.arange(len(labels_N)), labels_N]
    low, high = -np.log(_MOST), np.log(_MOST)  # of ln(1/T)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        expected_N = (softmax(logits_NK * np.exp(middle)) * logits_NK).sum(1)
        if (expected_N - right_N).mean() < 0:  # the derivative of the loss by 1/T
            low = middle
        else:
            high = middle
    return float(np.exp(-(low + high) / 2))


def best_threshold(
    confidences_N: NDArray[np.float64], correct_N: NDArray[np.bool_], *, precision: float
) -> Threshold:  # fmt: skip
    """The lowest threshold at which sure answers have the precision.

    Args:
        confidences_N: probability of the most likely product of each photo.
        correct_N: whether that product is right.
        precision: the share of sure answers that must be right.

    Returns:
        The threshold, and what it gives on these photos.
    """
    order = np.argsort(-confidences_N, kind="stable")
    sorted_N = confidences_N[order]
    reached_N = np.cumsum(correct_N[order]) / np.arange(1, len(order) + 1)
    is_last_N = np.append(sorted_N[1:] < sorted_N[:-1], True)  # equal ones are sure together
    possible = np.flatnonzero((reached_N >= precision) & is_last_N)
    if not len(possible):
        return Threshold(value=1.0, sure=0.0, precision=None)
    last = int(possible[-1])
    return Threshold(
        value=float(sorted_N[last]), sure=(last + 1) / len(order), precision=float(reached_N[last])
    )  # fmt: skip
