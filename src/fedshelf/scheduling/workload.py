"""How many local steps each client of a round takes, and how far that leads it.

Steps, so that all are predicted to finish together (the idea of Li et al. 2023, "FedCompass: Efficient Cross-Silo
Federated Learning on Heterogeneous Client Devices using a Computing Power Aware Scheduler"). Of client i: c_i steps
have the configured epochs, p_i seconds takes a step (`pace`), l_i and u_i are the least and the most steps it is given.

    dynamic:  steps_i <- T / p_i, within l_i and u_i,   T such that sum_i steps_i = sum_i c_i
    cut:      steps_i <- T / p_i, within l_i and c_i,   T the median of c_i · p_i

So `dynamic` deals the work that fixed epochs would be among the clients by their speed: who is slow does less, who is
fast more, and a round does as much as before. `cut` only takes work from those who are slower than the median.

Unequal work is weighed as in Wang et al. 2020, "Tackling the Objective Inconsistency Problem in Heterogeneous Federated
Optimization" (FedNova): with weights w_i and changes delta_i,

    change = tau_eff · sum_i w_i · delta_i / tau_i,   tau_eff = sum_i w_i · tau_i,   tau_i = |a_i| / |a'_i|

where a_i holds the coefficients that the gradients of client i's steps have in delta_i: all of them 1 for plain steps;
with Nesterov momentum rho the gradient of step k of n has (1 - rho^(n-k+2)) / (1 - rho), since it enters steps k .. n.
Without the division the mean is one of an objective in which clients count by how far they went.

The paper's norm |a_i|_1 is how far n steps lead that all point the same way. Steps of small batches at a high rate do
not: most of each is noise, and as in any random walk the way grows with |a_i|_2. Taken by |a_i|_1, the noise of the few
steps of a slow client would be blown up to several times what the others have (docs/explanation/unequal-machines.md has
the figures).

Differs from FedNova: the choice of the norm; and tau_i is relative to a'_i, that of client i's own configured epochs.
Fixed epochs are then FedAvg as it is (in the paper a client's tau grows with its photos, and FedNova takes that out of
FedAvg, too). What counts are the steps that the server has asked for, not those that an upload claims. AdamW's steps
count as plain ones.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from fedshelf.core.choices import LocalWork, WorkNorm
from fedshelf.training.settings import TrainingSettings

HALVINGS = 64  # of the interval in which T is looked for


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """The rule, and its bounds as multiples of the configured steps; the norm by which unequal work is weighed (none:
    it is not). `training` is how clients train."""

    rule: LocalWork = "fixed"
    least: float = 0.25
    most: float = 2.0
    norm: WorkNorm = "l2"
    training: TrainingSettings = TrainingSettings()  # noqa: RUF009  frozen

    def configured(self, num_train: int) -> int:
        """How many steps the configured epochs have over `num_train` photos."""
        return self.training.local_epochs * math.ceil(num_train / self.training.batch_size)

    def deal(self, configured: Mapping[str, int], pace: Mapping[str, float]) -> dict[str, int]:
        """The steps of each client.

        Args:
            configured: what its epochs have, at least 1 each.
            pace: seconds per step, of the same clients; empty where nothing is predicted.
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
        """tau_i: how far `num_steps` lead, as a multiple of how far the `configured` ones do; 1 where work is not
        weighed."""
        if self.norm == "none" or num_steps == configured:
            return 1.0
        return self._length(num_steps) / self._length(configured)

    def _length(self, num_steps: int) -> float:
        """|a| of so many steps, but for a factor of 1 - rho: the norm of 1 - rho^(k+1), k from 1 to `num_steps`."""
        rho = self.training.momentum if self.training.optimizer == "sgd" else 0.0
        sum_of_powers = rho**2 * (1 - rho**num_steps) / (1 - rho)
        if self.norm == "l1":
            return num_steps - sum_of_powers
        sum_of_squares = rho**4 * (1 - rho ** (2 * num_steps)) / (1 - rho**2)
        return math.sqrt(num_steps - 2 * sum_of_powers + sum_of_squares)


def _bounds(configured: int, least: float, most: float) -> tuple[int, int]:
    """Whole numbers of steps; the configured one always lies between them."""
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
