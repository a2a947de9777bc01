"""The algorithms by name: one line each. Nothing is imported before it is made."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedshelf.algorithms.base import Algorithm

ALGORITHMS: dict[str, str] = {
    "fedavg": "fedshelf.algorithms.fedavg:fedavg",
    "fedprox": "fedshelf.algorithms.fedprox:fedprox",
    "fedavgm": "fedshelf.algorithms.fedavgm:fedavgm",
    "fedadagrad": "fedshelf.algorithms.fedopt:fedadagrad",
    "fedadam": "fedshelf.algorithms.fedopt:fedadam",
    "fedyogi": "fedshelf.algorithms.fedopt:fedyogi",
    "scaffold": "fedshelf.algorithms.scaffold:scaffold",
    "fedbuff": "fedshelf.algorithms.fedbuff:fedbuff",
    "fedasync": "fedshelf.algorithms.fedasync:fedasync",
}
"""Name to the function (MODULE:NAME) that makes it of a run's settings, which are named as its flags."""


def make(name: str, settings: Mapping[str, Any]) -> Algorithm:
    """The algorithm `name`, both halves."""
    module, _, function = ALGORITHMS[name].partition(":")
    made: Algorithm = getattr(import_module(module), function)(settings)
    return made
