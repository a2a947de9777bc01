"""Aggregation in two steps: screens judge whole uploads, then a reducer works in coordinate blocks.

Shapes: b values of a block, T shared trainable values, S shared values, n uploads.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

    from fedshelf.algorithms.base import Reducer

logger = logging.getLogger(__name__)

TIMES_MEDIAN = 5.0  # the norm of an upload that stands out, as a multiple of the cohort's median
AT_ONCE = 1 << 20  # values of all uploads together that are processed at once
IN_CACHE = 1 << 16  # values of a block that stays in the second-level cache

Parts: TypeAlias = "Mapping[str, Sequence[Tensor]]"
"""The vectors of all uploads by part, one row per upload: "trainable" [T], "statistics" [S - T] if there are any, and
"auxiliary." + name [T]. Rows may be views of files: read them in blocks, and do not write to them.
"""


def norm(row: Tensor) -> float:
    """The Euclidean norm, accumulated in float64 block by block."""
    blocks = (row[start : start + AT_ONCE].double() for start in range(0, len(row), AT_ONCE))
    return math.sqrt(math.fsum(float(block @ block) for block in blocks))


def quick_norm(row: Tensor, other: Tensor | None = None) -> float:
    """The norm of `row`, or of its difference to `other`, to about six digits in a fifth of the time.

    Infinite for a norm above 1e19, and zero for one below 1e-22.
    """
    total = 0.0
    for start in range(0, len(row), IN_CACHE):
        block = row[start : start + IN_CACHE]
        block = block if other is None else block - other[start : start + IN_CACHE]
        total += float(block @ block)
    return math.sqrt(total)


def weighted_mean(rows: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean [b] of `rows` (each [b]), accumulated in float64 and rounded to their type.

    Multiplication and addition are rounded separately per value, so that neither the block size nor vector instructions
    change the result.
    """
    total = rows[0].new_zeros(rows[0].shape).double()
    product = total.clone()
    for row, weight in zip(rows, weights, strict=True):
        product.copy_(row)
        product.mul_(weight)
        total.add_(product)
    return total.to(rows[0].dtype)


def plain_mean(rows: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The unweighted mean [b] of `rows` (each [b])."""
    return weighted_mean(rows, [1 / len(rows)] * len(rows))


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """A screen's verdict on one upload.

    Attributes:
        left_out: whether the upload is ignored.
        factors: factor on each part; 1 if absent.
        reason: why, for a person; empty if the upload is used unchanged.
    """

    left_out: bool = False
    factors: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""

    def then(self, later: Verdict) -> Verdict:
        """Combine this verdict with a later one."""
        parts = [*self.factors, *(part for part in later.factors if part not in self.factors)]
        return Verdict(
            left_out=self.left_out or later.left_out,
            factors={part: self.factors.get(part, 1.0) * later.factors.get(part, 1.0) for part in parts},
            reason="; ".join(reason for reason in (self.reason, later.reason) if reason),
        )


Screen: TypeAlias = Callable[[Parts], Sequence[Verdict]]
"""Judges all uploads of a round together, and accepts at least one."""


def accept_any_number(num_uploads: int) -> str:
    """Accept any number of uploads."""
    return ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Aggregator:
    """Aggregates uploads. Independent of the algorithm, which defines their content and the use of the result.

    Attributes:
        reducer: reduces rows to one.
        screens: applied first, in order; each sees, as sent, the uploads that no earlier one has left out. Their
            factors are multiplied.
        problem: why it cannot work with a number of uploads; empty if it can.
        otherwise: the replacement for a round with such a number, so that the round does not fail.
        leaves_out: whether it may leave out whole uploads.
    """

    reducer: Reducer = weighted_mean
    screens: tuple[Screen, ...] = ()
    problem: Callable[[int], str] = accept_any_number
    otherwise: Aggregator | None = None
    leaves_out: bool = False

    def suited_to(self, num_uploads: int) -> Aggregator:
        """This aggregator, or its replacement for `num_uploads`."""
        problem = self.problem(num_uploads)
        if not problem or self.otherwise is None:
            return self
        logger.warning("%s", problem)
        return self.otherwise.suited_to(num_uploads)


MEAN = Aggregator()
"""The weighted mean of all uploads."""
