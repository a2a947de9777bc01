"""FedShelf: one product-recognition model trained over all stores, while photos never leave a store.

The public names are imported when they are first used, so that `import fedshelf` is fast.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedshelf import algorithms as algorithms
    from fedshelf.api.client import join as join
    from fedshelf.api.federation import Federation as Federation
    from fedshelf.api.result import Result as Result
    from fedshelf.api.result import StoreResult as StoreResult
    from fedshelf.api.server import serve as serve
    from fedshelf.core.errors import FedShelfError as FedShelfError
    from fedshelf.training.own_training import Hooks as Hooks

__all__ = ["FedShelfError", "Federation", "Hooks", "Result", "StoreResult", "algorithms", "join", "serve"]
__version__ = "0.1.0"

_MODULES = {
    "FedShelfError": "core.errors", "Federation": "api.federation", "Hooks": "training.own_training",
    "Result": "api.result", "StoreResult": "api.result", "join": "api.client", "serve": "api.server",
}  # fmt: skip

# Before torch loads: OpenMP threads that spin while idle made training on a busy machine 12 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


if not TYPE_CHECKING:  # type checkers know the names, and report others

    def __getattr__(name: str) -> object:
        """Import a public name when it is first used."""
        if name == "algorithms":
            return import_module("fedshelf.algorithms")
        if name not in _MODULES:
            raise AttributeError(f"module 'fedshelf' has no attribute {name!r}")
        return getattr(import_module(f"fedshelf.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
