"""Which fields of a client's messages do not leave the store: by its policy, or because noise would not cover them.

A field that is listed neither in `WITHHELD_BY` nor in `WITHOUT_NOISE` leaves the store with its message. A message
whose purpose the policy does not allow never leaves.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, TypeVar

from fedshelf.core.errors import RefusedError
from fedshelf.core.messages import ClientMessage, Comparison, Evaluation, Join, Ready, Upload
from fedshelf.privacy.policy_tables import Metrics

M = TypeVar("M", bound=Ready | Upload | Comparison | Evaluation)

WITHHELD_BY: Mapping[type[Any], Mapping[str, str]] = MappingProxyType(
    {
        Join: {"classes": "class_names"},
        Ready: {"num_train": "example_counts", "num_validation": "example_counts", "num_left_out": "example_counts"},
        Upload: {
            "num_examples": "example_counts", "num_steps": "example_counts", "train_loss": "losses",
            "seconds": "example_counts", "mechanism": "example_counts",
        },
        Evaluation: {
            "loss_sum": "losses", "candidates": "losses", "products": "counts_products", "levels": "counts_products",
        },
        Comparison: {"accuracies": "example_counts", "num_validation": "example_counts"},
    }
)  # fmt: skip
"""By message and field, the attribute of `Metrics` that lets the field leave."""
WITHOUT_NOISE: Mapping[type[Any], Mapping[str, Any] | None] = MappingProxyType(
    {
        Ready: {"num_validation": None},
        Upload: {"train_loss": None, "seconds": None},
        Evaluation: None,
        Comparison: {"best": None, "accuracies": {}, "on_test": False, "num_validation": None},
    }
)
"""In runs with noise in the store (--dp sample), by message: what the server is told instead of what was computed from
photos, and has no noise. None: the message is never sent."""
_EMPTY: Mapping[str, Any] = {"classes": (), "candidates": (), "products": (), "levels": (), "accuracies": {}}


def withhold(message: ClientMessage, metrics: Metrics) -> ClientMessage:
    """The message without the fields that a policy withholds.

    Args:
        message: a message of the client.
        metrics: what the policy lets leave.
    """
    fields = WITHHELD_BY.get(type(message), {})
    withheld: dict[str, Any] = {name: _EMPTY.get(name) for name, key in fields.items() if not getattr(metrics, key)}
    return replace(message, **withheld)


def only_noised(message: M) -> M:
    """The message of a run with noise in the store, without what the noise does not cover.

    Args:
        message: a message of the client.

    Raises:
        RefusedError: nothing of it has noise.
    """
    told = WITHOUT_NOISE.get(type(message), {})
    if told is None:
        raise RefusedError(f"{type(message).__name__.lower()}: its figures would have no noise (--dp sample)")
    return replace(message, **told)
