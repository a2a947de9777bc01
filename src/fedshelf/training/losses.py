"""Losses by name.

All algorithms can use those against label skew: a store sells a part of the catalogue, and plain cross-entropy pushes
down the logits of all products that it does not sell at every step.

FedRS: Li & Zhan 2021, "FedRS: Federated Learning with Restricted Softmax for Label Distribution Non-IID Data", eq. 8.
FedLC: Zhang et al. 2022, "Federated Learning with Label Distribution Skew via Logits Calibration", the calibrated
cross-entropy of its section on FedLC. Both are cross-entropy of logits under an affine map that depends on the client:

    client k, before it trains:                         client k, for each batch of photos x with labels y:
     1  n_c <- its training photos of class c            5  z <- logits of x
     2  a_c <- 1; b_c <- 0                               6  z_c <- a_c · z_c + b_c
     3  FedRS: a_c <- alpha where n_c = 0                7  minimize -log(exp(z_y) / sum_c exp(z_c))
     4  FedLC: b_c <- -tau · n_c^(-1/4)

Where n_c = 0, line 4 is -infinity for any tau: the class is excluded from the softmax, and its logit gets no
gradient. A store that sells one product then has a loss of zero and learns nothing from it. With all classes in stock,
FedRS is plain cross-entropy, and so is FedLC with tau = 0 or equal counts. Label smoothing is spread over the classes
in the softmax. Models are evaluated by plain cross-entropy over all classes.

Differs from the papers: FedRS scales by one of two values, as in its eq. 8 (the authors' code scales by alpha + (1 -
alpha) · n_c / max n), and scales the whole logit, including its bias (the authors' code has none). FedLC's sum in line
7 excludes the label's own class in the paper; included, it is a softmax, and the loss has a lower bound. Labels are
smoothed. Weight decay acts on the classifier's rows of absent classes as on all others.

Shapes: B batch, K classes, N training photos of a client, G clients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, NamedTuple, Protocol

from fedshelf.core.settings import Setting

if TYPE_CHECKING:
    from torch import Tensor

LOSSES: dict[str, str] = {
    "cross-entropy": "fedshelf.training.losses:CROSS_ENTROPY",
    "fedrs": "fedshelf.training.losses:FedRS",
    "fedlc": "fedshelf.training.losses:FedLC",
}
"""Components (`core.settings`) that make a `Loss`, or None for plain cross-entropy."""


class Calibration(NamedTuple):
    """An affine map of a client's logits in training.

    Attributes:
        scale: factor [K].
        shift: offset [K]; -inf excludes the class.
    """

    scale: Tensor
    shift: Tensor


class Loss(Protocol):
    """A loss with client-dependent calibration."""

    def calibration(self, counts_K: Tensor) -> Calibration:
        """The calibration for a client with `counts_K` training photos per class."""
        ...


CROSS_ENTROPY = None


@dataclass(frozen=True, slots=True)
class FedRS:
    """Restricted softmax (Li & Zhan 2021)."""

    alpha: Annotated[float, Setting(key="fedrs_alpha", help="Factor on the logits of products that a store does not "
        "sell.", ge=0, le=1)] = 0.5  # fmt: skip

    def calibration(self, counts_K: Tensor) -> Calibration:
        scale_K = counts_K.new_ones(len(counts_K)).float().masked_fill(counts_K == 0, self.alpha)  # line 3
        return Calibration(scale_K, scale_K.new_zeros(len(scale_K)))


@dataclass(frozen=True, slots=True)
class FedLC:
    """Logit calibration (Zhang et al. 2022)."""

    tau: Annotated[float, Setting(key="fedlc_tau", help="Strength of the margins; products with fewer photos get "
        "wider ones.", ge=0)] = 1.0  # fmt: skip

    def calibration(self, counts_K: Tensor) -> Calibration:
        margins_K = self.tau * counts_K.float().pow(-0.25)
        shift_K = (-margins_K).masked_fill(counts_K == 0, -math.inf)  # line 4; also if tau is 0
        return Calibration(shift_K.new_ones(len(shift_K)), shift_K)
