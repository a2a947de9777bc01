"""A process that calls `fedshelf.serve` or `fedshelf.join`, for tests: `python -m tests.api_process NAME JSON [own]`.

It prints the result as an event, or the error that was raised.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fedshelf

RECIPE: dict[str, Any] = {
    "model": "resnet10", "width": 8, "image_size": 16, "local_epochs": 1, "batch_size": 8, "client_lr": 0.05,
    "warmup_rounds": 0, "seed": 7, "threads": 1, "val_fraction": 0.1,
}  # fmt: skip


def own_training(
    module: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], client_lr: float, hooks: fedshelf.Hooks
) -> Tensor:
    """AdamW, which the configuration does not ask for."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=client_lr / 10)
    loss = torch.zeros(())
    for photos, labels in batches:
        optimizer.zero_grad()
        loss = hooks.loss(module(photos), labels)
        loss.backward()
        hooks.before_step()
        optimizer.step()
    return loss


def main() -> None:
    name, values, *own = sys.argv[1:]
    found: dict[str, Any]
    given = {**json.loads(values), **({"local_training": own_training} if own else {})}
    try:
        if name == "serve":
            result = fedshelf.serve(progress=False, **RECIPE, **given)
            found = {"status": result.status, "rounds": len(result.history), "stores": list(result.stores)}
        else:
            found = {"folder": str(fedshelf.join(**given))}
    except fedshelf.FedShelfError as error:
        found = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps({"event": "returned", **found}), flush=True)


if __name__ == "__main__":
    main()
