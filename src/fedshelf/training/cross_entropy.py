"""Cross-entropy of calibrated logits (`training.losses`): what every loss comes to.

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
    """The calibration of a client with N training photos of these labels; None: none.

    Args:
        loss: the configured one; None: plain cross-entropy.
        labels_N: of its training photos.
        num_classes: K; only a loss that depends on what the client stocks has to know it.
        device: where the calibration is used.

    Raises:
        ValueError: such a loss, and K is not known.
    """
    if loss is None:
        return None
    if num_classes is None:
        raise ValueError(f"{loss} depends on the classes in stock: say how many there are in all")
    return loss.calibration(torch.from_numpy(np.bincount(labels_N, minlength=num_classes)).to(device))  # line 1


def stacked(calibrations: Sequence[Calibration | None]) -> Calibration | None:
    """Those of G clients as one, each part [G, K]; None if they have none (all have, or none has)."""
    found = [calibration for calibration in calibrations if calibration is not None]
    return Calibration(*(torch.stack(parts) for parts in zip(*found, strict=True))) if found else None


def cross_entropy(
    logits_BK: Tensor, labels_B: Tensor, calibration: Calibration | None, *, label_smoothing: float
) -> Tensor:
    """The mean loss (nats, scalar) over a batch of labels that the client stocks."""
    if calibration is None:
        return F.cross_entropy(logits_BK, labels_B, label_smoothing=label_smoothing)
    log_p_BK = F.log_softmax(logits_BK * calibration.scale + calibration.shift, dim=1)  # lines 6 and 7
    loss = F.nll_loss(log_p_BK, labels_B)
    if not label_smoothing:
        return loss
    # torch's own smoothing would weigh the -inf of classes that are left out, and come out infinite
    taking_part_K = calibration.shift.isfinite()
    smooth_B = -torch.where(taking_part_K, log_p_BK, 0.0).sum(1) / taking_part_K.sum()
    return (1 - label_smoothing) * loss + label_smoothing * smooth_B.mean()
