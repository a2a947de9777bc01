"""A loss and its gradient with regard to the logits, for tests of the papers' losses.

Shapes: B batch, K classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedshelf.training.cross_entropy import cross_entropy
from fedshelf.training.losses import Calibration


def loss_and_gradient(
    logits_BK: Tensor, labels_B: Sequence[int], calibration: Calibration | None, smoothing: float = 0.0
) -> tuple[float, Tensor]:
    """The mean loss of a batch, and its gradient [B, K]."""
    variable = logits_BK.clone().requires_grad_()
    loss = cross_entropy(variable, torch.tensor(labels_B), calibration, label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(loss, variable)
    return loss.item(), gradient
