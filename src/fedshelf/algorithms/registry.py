"""The algorithms by name: one line each."""

from collections.abc import Callable, Mapping
from typing import Any

from fedshelf.algorithms.base import Algorithm
from fedshelf.algorithms.fedavg import FedAvg
from fedshelf.algorithms.fedprox import FedProx

ALGORITHMS: Mapping[str, Callable[[Mapping[str, Any]], Algorithm]] = {
    "fedavg": lambda settings: FedAvg(),
    "fedprox": lambda settings: FedProx(mu=settings["mu"]),
}
"""Name to a function of the algorithm's settings (flag names, with underscores)."""
