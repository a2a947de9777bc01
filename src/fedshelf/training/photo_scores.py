"""How well a model does at one store: photo by photo, and weighed by what the store sells.

Shapes: N photos to judge by, M photos of the store's own, K classes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedshelf.data.dataset import PhotoSet
from fedshelf.training.bound_model import BoundModel
from fedshelf.training.trainer import logits


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PhotoScores:
    """What a model made of each of N photos: whether it named it right, and the cross-entropy (nats)."""

    right: NDArray[np.bool_]
    losses: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.right)

    @property
    def accuracy(self) -> float | None:
        """The share of photos that it named right; None where there are no photos."""
        return float(self.right.mean()) if len(self) else None


def score_photos(bound: BoundModel, photos: PhotoSet) -> PhotoScores:
    """Mark the workbench's present model."""
    right, losses = [np.zeros(0, dtype=np.bool_)], [np.zeros(0)]
    for logits_BK, labels_B in logits(bound, photos):
        right.append((logits_BK.argmax(1) == labels_B).cpu().numpy())
        losses.append(-logits_BK.double().log_softmax(1).gather(1, labels_B[:, None])[:, 0].cpu().numpy())
    return PhotoScores(right=np.concatenate(right), losses=np.concatenate(losses))


def of_classes(photos: PhotoSet, own_labels_M: NDArray[np.int64]) -> PhotoSet:
    """Those of `photos` that show what the store sells."""
    chosen = np.flatnonzero(np.isin(photos.labels, own_labels_M))
    return PhotoSet(photos.images[chosen], photos.labels[chosen])


def reweighted_accuracy(
    right_N: NDArray[np.bool_], labels_N: NDArray[np.int64], own_labels_M: NDArray[np.int64]
) -> float | None:
    """A store's own-mix accuracy: sum over classes c of p(c) · accuracy on the N photos of class c.

    p(c) is the share of c among the store's own photos. Classes without a photo among the N are left out, and p is
    normalized over the others; None where no class is left.

    Args:
        right_N: whether the model named each photo right.
        labels_N: what the photos show.
        own_labels_M: of all the store's photos.
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
