"""Which fields of a client's messages a store's policy can withhold, and their removal.

A field that is not listed in `WITHHELD_BY` leaves the store with its message. A message whose purpose the policy does
not allow never leaves.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from fedshelf.core.messages import ClientMessage, Comparison, Evaluation, Join, Ready, Upload
from fedshelf.privacy.policy_tables import Metrics

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
