"""Labels of photos, and their features, from the gradient of the output layer.

One photo, iDLG:  Zhao et al. 2020, "iDLG: Improved Deep Leakage from Gradients"
A batch, LLG:     Wainakh et al. 2022, "User-Level Label Leakage from Gradients in Federated Learning"

With cross-entropy, the gradient of the bias of class c is the mean over the batch of p_c - y_c, so that it is negative
only for classes that are in the batch:

    1  g <- gradient of the bias; without one, the sums of the rows of the gradient of the weights
    2  m <- (1 + 1/K) / B · the sum of all g_c < 0          what a photo adds to its class, estimated
    3  each c with g_c < 0 is in the batch: count it, and g_c <- g_c - m
    4  until B photos are counted: count the class c with the least g_c, and g_c <- g_c - m

A photo's features are the row of its class in the gradient of the weights, divided by that of the bias: exactly, if the
photo is alone in its batch.

Shapes: B photos, D features, K classes.
"""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from fedshelf.training.bound_model import BoundModel


def infer_labels(bias_gradient_K: Tensor, num_photos: int) -> Counter[int]:
    """Count the labels of a batch.

    Args:
        bias_gradient_K: the gradient of line 1, at any positive scale.
        num_photos: B.

    Returns:
        Photos by class.
    """
    left = bias_gradient_K.double().clone()
    impact = float(left.clamp(max=0).sum()) * (1 + 1 / len(left)) / num_photos
    found: Counter[int] = Counter()
    negative = (left < 0).sum().item()
    for label in left.argsort().tolist()[: min(int(negative), num_photos)]:
        found[label] += 1
        left[label] -= impact
    while found.total() < num_photos:
        label = int(left.argmin())
        found[label] += 1
        left[label] -= impact
    return found


def num_right(found: Mapping[int, int], labels_B: Tensor) -> int:
    """How many of the photos' labels a count gets right."""
    return (Counter(labels_B.tolist()) & Counter(found)).total()


def by_chance(labels_B: Tensor, num_classes: int, *, repetitions: int = 200, seed: int = 0) -> float:
    """The share of labels that the same attack gets right on average if the gradient is random."""
    generator = torch.Generator().manual_seed(seed)
    right = 0
    for _ in range(repetitions):
        random = torch.randn(num_classes, generator=generator)
        right += num_right(infer_labels(random, len(labels_B)), labels_B)
    return right / (repetitions * len(labels_B))


def head_gradient(bound: BoundModel, gradients: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the output layer's weights [K, D] and of its bias [K] (line 1).

    Args:
        bound: the model.
        gradients: the observed gradient by tensor.

    Returns:
        The two; None for both if the output layer is not a single linear one, or is not shared.
    """
    weight = gradients.get(f"{bound.output_layer}.weight") if bound.output_layer else None
    if weight is None:
        return None, None
    return weight, gradients.get(f"{bound.output_layer}.bias", weight.sum(1))


def infer_features(weight_gradient_KD: Tensor, bias_gradient_K: Tensor) -> Tensor:
    """[D]: the features of a photo that is alone in its batch."""
    label = int(bias_gradient_K.argmin())
    return weight_gradient_KD[label] / bias_gradient_K[label]
