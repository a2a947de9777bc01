"""The number of local steps of each client in a round, and the weighting of unequal work.

Steps are chosen so that all clients are predicted to finish together (the idea of Li et al. 2023, "FedCompass:
Efficient Cross-Silo Federated Learning on Heterogeneous Client Devices using a Computing Power Aware Scheduler"). For
client i: c_i steps in the configured epochs, p_i seconds per step (`pace`), l_i and u_i the least and the most steps:

    dynamic:  steps_i <- T / p_i, within l_i and u_i,   T such that sum_i steps_i = sum_i c_i
    cut:      steps_i <- T / p_i, within l_i and c_i,   T the median of c_i · p_i

`dynamic` redistributes the work of fixed epochs by speed: slow clients do less, fast ones more, and a round does as
much as before. `cut` only reduces the work of clients slower than the median.

Unequal work is weighted as in Wang et al. 2020, "Tackling the Objective Inconsistency Problem in Heterogeneous
Federated Optimization" (FedNova): with weights w_i and changes delta_i,

    change = tau_eff · sum_i w_i · delta_i / tau_i,   tau_eff = sum_i w_i · tau_i,   tau_i = |a_i| / |a'_i|

where a_i holds the coefficients of the gradients of client i's steps in delta_i: all 1 for plain steps; with Nesterov
momentum rho the gradient of step k of n has (1 - rho^(n-k+2)) / (1 - rho), since it enters steps k .. n. Without the
division, the mean optimizes an objective in which clients count by the length of their training.

The paper's norm |a_i|_1 is the length of n steps in the same direction. Steps of small batches at a high rate differ:
most of each is noise, and as in any random walk the length grows with |a_i|_2. With |a_i|_1, the noise of a slow
client's few steps would be amplified to several times that of the others (figures:
docs/explanation/unequal-machines.md).

Differs from FedNova: the choice of the norm; and tau_i is relative to a'_i, that of client i's own configured epochs.
Fixed epochs are then plain FedAvg (in the paper a client's tau grows with its photos, and FedNova also removes that
from FedAvg). The steps are those that the server assigned, not those that an upload claims. AdamW's steps count as
plain ones.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from fedshelf.core.choices import LocalWork, WorkNorm
from fedshelf.training.settings import TrainingSettings

HALVINGS = 64  # bisection steps of the search for T


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """The rule for local steps, and the weighting of unequal work.

    Attributes:
        rule: the rule.
        least: lower bound, as a multiple of the configured steps.
        most: upper bound, as a multiple of the configured steps.
        norm: norm for weighting unequal work; `none`: no weighting.
        training: settings of local training.
    """

    rule: LocalWork = "fixed"
    least: float = 0.25
    most: float = 2.0
    norm: WorkNorm = "l2"
    training: TrainingSettings = TrainingSettings()  # noqa: RUF009  frozen

    def configured(self, num_train: int) -> int:
        """The steps of the configured epochs over `num_train` photos."""
        return self.training.local_epochs * math.ceil(num_train / self.training.batch_size)

    def deal(self, configured: Mapping[str, int], pace: Mapping[str, float]) -> dict[str, int]:
        """The steps of each client.

        Args:
            configured: by client, the steps of its configured epochs, at least 1.
            pace: by client, seconds per step; empty if nothing is predicted.
        """
        if self.rule == "fixed" or not pace:
            return dict(configured)
        most = self.most if self.rule == "dynamic" else 1.0
        bounds = {name: _bounds(steps, self.least, most) for name, steps in configured.items()}
        durations = {name: steps * pace[name] for name, steps in configured.items()}
        if self.rule == "cut":
            together = statistics.median(durations.values())
        else:
            together = _time_for(sum(configured.values()), bounds, pace)
        return {name: round(_within(bounds[name], together / pace[name])) for name in configured}

    def share(self, num_steps: int, configured: int) -> float:
        """tau_i: the length of `num_steps`, as a multiple of that of the `configured` steps; 1 without weighting."""
        if self.norm == "none" or num_steps == configured:
            return 1.0
        return self._length(num_steps) / self._length(configured)

    def _length(self, num_steps: int) -> float:
        """|a| of `num_steps` up to a factor of 1 - rho: the norm of 1 - rho^(k+1), k from 1 to `num_steps`."""
        rho = self.training.momentum if self.training.optimizer == "sgd" else 0.0
        sum_of_powers = rho**2 * (1 - rho**num_steps) / (1 - rho)
        if self.norm == "l1":
            return num_steps - sum_of_powers
        sum_of_squares = rho**4 * (1 - rho ** (2 * num_steps)) / (1 - rho**2)
        return math.sqrt(num_steps - 2 * sum_of_powers + sum_of_squares)


def _bounds(configured: int, least: float, most: float) -> tuple[int, int]:
    """The bounds as whole steps; the configured number is always between them."""
    return max(1, math.ceil(round(least * configured, 9))), math.floor(round(most * configured, 9))


def _within(bounds: tuple[int, int], steps: float) -> float:
    return min(max(steps, bounds[0]), bounds[1])


def _time_for(total: int, bounds: Mapping[str, tuple[int, int]], pace: Mapping[str, float]) -> float:
    """T (seconds) in which clients at their paces, within their bounds, take `total` steps together."""
    low = min(least * pace[name] for name, (least, _) in bounds.items())
    high = max(most * pace[name] for name, (_, most) in bounds.items())
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        done = sum(_within(bounds[name], middle / pace[name]) for name in bounds)
        low, high = (middle, high) if done < total else (low, middle)
    return high
