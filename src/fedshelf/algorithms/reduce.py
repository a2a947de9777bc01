"""Reducers: how rows of one coordinate block become one.

Shapes: b values of a block.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def weighted_mean(rows: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean [b] of `rows` (each [b]), accumulated in float64.

    Multiplication and addition are rounded apart, value by value: neither the block's size nor vector
    instructions change the result.
    """
    total = torch.zeros(rows[0].shape, dtype=torch.float64, device=rows[0].device)
    product = torch.empty_like(total)
    for row, weight in zip(rows, weights, strict=True):
        product.copy_(row)
        product.mul_(weight)
        total.add_(product)
    return total.float()
