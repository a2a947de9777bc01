"""What an upload, or a comparison, must satisfy before anything of it is used.

Shapes: S shared values.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from fedshelf.core.errors import RefusedError
from fedshelf.core.messages import Comparison, TaskKey, Upload
from fedshelf.core.params import Layout

BLOCK = 1 << 20  # values checked at once


def check_upload(upload: Upload, *, key: TaskKey, layout: Layout, auxiliary: tuple[str, ...]) -> None:
    """Refuse an upload that is for other work, of another shape, not finite, or makes impossible claims.

    Raises:
        RefusedError: naming the first thing that is wrong and, where a tensor is, its name.
    """
    if upload.key != key:
        raise RefusedError(
            f"it is for {_describe(upload.key)}, and the open one is {_describe(key)}: stale or of another run"
        )
    if upload.delta.numel() != layout.num_shared:
        raise RefusedError(
            f"its delta has shape ({upload.delta.numel()},), the server's layout ({layout.num_shared},): the client's "
            "model or catalogue is another; start 'fedshelf client' again"
        )
    if set(upload.auxiliary) != set(auxiliary):
        raise RefusedError(
            f"it carries the vectors {sorted(upload.auxiliary)}, the algorithm declares {sorted(auxiliary)}"
        )
    wrong = [name for name, vector in upload.auxiliary.items() if vector.numel() != layout.num_trainable]
    if wrong:
        raise RefusedError(f"its vectors {wrong} do not have the {layout.num_trainable} trainable values of the layout")
    for name, vector in {"delta": upload.delta, **upload.auxiliary}.items():
        bad = _first_not_finite(vector)
        if bad is not None:
            where = f" in tensor {layout.at(bad).name!r}" if name == "delta" else ""
            raise RefusedError(
                f"its {name} holds {vector[bad].item()}{where}; training diverged, or the data is damaged"
            )
    if upload.num_examples < 1 or upload.num_steps < 0:
        raise RefusedError(f"it claims {upload.num_examples} examples in {upload.num_steps} steps")
    metrics = (upload.train_loss, upload.seconds, upload.client_lr or 0.0)
    if not all(math.isfinite(metric) for metric in metrics):
        raise RefusedError(
            f"its metrics are not finite (train_loss {upload.train_loss}, seconds {upload.seconds}, "
            f"client_lr {upload.client_lr})"
        )


def check_comparison(comparison: Comparison, *, key: TaskKey, num_validation: int) -> None:
    """Refuse a comparison that is for other work or makes impossible claims.

    Raises:
        RefusedError: naming the first thing that is wrong.
    """
    if comparison.key != key:
        raise RefusedError("it is for other work")
    if comparison.num_validation != num_validation:
        raise RefusedError(
            f"it was chosen on {comparison.num_validation} validation photos, and the client came with {num_validation}"
        )
    for candidate, accuracy in comparison.accuracies.items():
        if not 0 <= accuracy <= 1:  # what is no number is not either
            raise RefusedError(f"it claims an accuracy of {accuracy} for the {candidate.value} model")
    if comparison.accuracies and comparison.best not in comparison.accuracies:
        raise RefusedError(f"it keeps the {comparison.best.value} model, and says nothing of how that does")


def cap_examples(upload: Upload, most: int) -> Upload:
    """The upload with its claim to weight bounded: a hostile client may claim any number of photos."""
    return replace(upload, num_examples=most) if upload.num_examples > most else upload


def _first_not_finite(vector: Tensor) -> int | None:
    for start in range(0, vector.numel(), BLOCK):
        block = vector[start : start + BLOCK]
        # The extremes are not finite where any value is not, NaN included, and cost a tenth of `isfinite`.
        if not all(math.isfinite(extreme) for extreme in torch.aminmax(block)):
            return start + int(torch.isfinite(block).logical_not().nonzero()[0])
    return None


def _describe(key: TaskKey) -> str:
    return f"round {key.round}, attempt {key.attempt + 1} of run {key.run_id}"
