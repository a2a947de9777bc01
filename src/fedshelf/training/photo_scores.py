"""A model's scores at one store: per photo, and weighted by the store's class distribution.

Shapes: N photos to evaluate on, M photos of the store, K classes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedshelf.data.photo_set import PhotoSet
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.trainer import logits


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PhotoScores:
    """A model's scores on each of N photos.

    Attributes:
        right: whether the prediction is correct.
        losses: cross-entropy (nats).
    """

    right: NDArray[np.bool_]
    losses: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.right)

    @property
    def accuracy(self) -> float | None:
        """Fraction of correct predictions; None if there are no photos."""
        return float(self.right.mean()) if len(self) else None


def score_photos(bound: BoundModel, photos: PhotoSet) -> PhotoScores:
    """Score the bound model on photos."""
    right, losses = [np.zeros(0, dtype=np.bool_)], [np.zeros(0)]
    for logits_BK, labels_B in logits(bound, photos):
        right.append((logits_BK.argmax(1) == labels_B).cpu().numpy())
        losses.append(-logits_BK.double().log_softmax(1).gather(1, labels_B[:, None])[:, 0].cpu().numpy())
    return PhotoScores(right=np.concatenate(right), losses=np.concatenate(losses))


def of_classes(photos: PhotoSet, own_labels_M: NDArray[np.int64]) -> PhotoSet:
    """The subset of `photos` that shows classes in the store's own labels."""
    chosen = np.flatnonzero(np.isin(photos.labels, own_labels_M))
    return PhotoSet(photos.images[chosen], photos.labels[chosen])


def reweighted_accuracy(
    right_N: NDArray[np.bool_], labels_N: NDArray[np.int64], own_labels_M: NDArray[np.int64]
) -> float | None:
    """Accuracy under the store's class distribution: sum over classes c of p(c) · accuracy on the N photos of class c.

    p(c) is the share of c among the store's own photos. Classes without any of the N photos are left out, and p is
    normalized over the others.

    Args:
        right_N: whether each prediction is correct.
        labels_N: labels of the photos.
        own_labels_M: labels of all the store's photos.

    Returns:
        The accuracy; None if no class is left.
    """
    if not len(labels_N) or not len(own_labels_M):
        return None
    num_classes = int(max(labels_N.max(), own_labels_M.max())) + 1
    own_K, tested_K = (np.bincount(labels, minlength=num_classes) for labels in (own_labels_M, labels_N))
    right_K = np.bincount(labels_N[right_N], minlength=num_classes)
    counted = (own_K > 0) & (tested_K > 0)
    if not counted.any():
        return None
    weights, accuracies = own_K[counted], right_K[counted] / tested_K[counted]
    return float((weights * accuracies).sum() / weights.sum())
