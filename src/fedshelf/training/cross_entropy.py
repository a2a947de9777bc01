"""Cross-entropy of calibrated logits (`training.losses`), the common form of all losses.

Shapes: B batch, K classes, N training photos of a client, G clients.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fedshelf.training.losses import Calibration, Loss


def calibration_of(
    loss: Loss | None, labels_N: NDArray[np.int64], num_classes: int | None, device: torch.device
) -> Calibration | None:
    """The calibration for a client; None if the loss is plain cross-entropy.

    Args:
        loss: the configured loss; None: plain cross-entropy.
        labels_N: labels of the client's training photos.
        num_classes: K; only required by losses that depend on the client's classes.
        device: where the calibration is used.

    Raises:
        ValueError: the loss requires K, and K is unknown.
    """
    if loss is None:
        return None
    if num_classes is None:
        raise ValueError(f"{loss} depends on the classes in stock: say how many there are in all")
    return loss.calibration(torch.from_numpy(np.bincount(labels_N, minlength=num_classes)).to(device))  # line 1


def stacked(calibrations: Sequence[Calibration | None]) -> Calibration | None:
    """Stack the calibrations of G clients, each part [G, K]; None if none has one (either all have one, or none)."""
    found = [calibration for calibration in calibrations if calibration is not None]
    return Calibration(*(torch.stack(parts) for parts in zip(*found, strict=True))) if found else None


def cross_entropy(
    logits_BK: Tensor, labels_B: Tensor, calibration: Calibration | None, *, label_smoothing: float
) -> Tensor:
    """The mean loss (nats, scalar) over a batch.

    Args:
        logits_BK: the model's logits.
        labels_B: labels, all of classes that the client stocks.
        calibration: the client's calibration, if any.
        label_smoothing: smoothing over the classes in the softmax.
    """
    if calibration is None:
        return F.cross_entropy(logits_BK, labels_B, label_smoothing=label_smoothing)
    log_p_BK = F.log_softmax(logits_BK * calibration.scale + calibration.shift, dim=1)  # lines 6 and 7
    loss = F.nll_loss(log_p_BK, labels_B)
    if not label_smoothing:
        return loss
    # torch's own smoothing would weight the -inf of excluded classes, and return infinity.
    taking_part_K = calibration.shift.isfinite()
    smooth_B = -torch.where(taking_part_K, log_p_BK, 0.0).sum(1) / taking_part_K.sum()
    return (1 - label_smoothing) * loss + label_smoothing * smooth_B.mean()
