"""How uploads become one: screens that look at whole uploads, then a reducer that works in coordinate blocks.

Shapes: b values of a block, T shared trainable values, S shared values, n uploads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

    from fedshelf.algorithms.base import Reducer

logger = logging.getLogger(__name__)

Parts: TypeAlias = "Mapping[str, Sequence[Tensor]]"
"""What uploads hold, part by part, one row for each upload: "trainable" [T], "statistics" [S - T] if there are any,
and "auxiliary." + name [T]. Rows may be views of files: read them in blocks, and do not write to them."""


def weighted_mean(rows: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean [b] of `rows` (each [b]), accumulated in float64.

    Multiplication and addition are rounded apart, value by value: neither the block's size nor vector
    instructions change the result.
    """
    total = rows[0].new_zeros(rows[0].shape).double()
    product = total.clone()
    for row, weight in zip(rows, weights, strict=True):
        product.copy_(row)
        product.mul_(weight)
        total.add_(product)
    return total.float()


def plain_mean(rows: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The mean [b] of `rows` (each [b]), all of them alike."""
    return weighted_mean(rows, [1 / len(rows)] * len(rows))


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What a screen finds about one upload.

    Attributes:
        left_out: nothing of it is used.
        factors: by part, what that is multiplied by; 1 where it is absent.
        reason: why, for a person; empty where the upload is used as it is.
    """

    left_out: bool = False
    factors: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""

    def then(self, later: Verdict) -> Verdict:
        """Both findings as one."""
        parts = [*self.factors, *(part for part in later.factors if part not in self.factors)]
        return Verdict(
            left_out=self.left_out or later.left_out,
            factors={part: self.factors.get(part, 1.0) * later.factors.get(part, 1.0) for part in parts},
            reason="; ".join(reason for reason in (self.reason, later.reason) if reason),
        )


Screen: TypeAlias = Callable[[Parts], Sequence[Verdict]]
"""Judges the uploads of a round, all of them together; it leaves at least one in."""


def suits_any_number(num_uploads: int) -> str:
    """No problem."""
    return ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Aggregator:
    """How uploads become one: orthogonal to the algorithm, which says what they are and what becomes of the result.

    Attributes:
        reducer: makes one row of many.
        screens: look at the uploads first, one screen after the other: each sees, as they were sent, the uploads that
            no screen before it has left out. The factors of several are multiplied.
        problem: why it cannot work on so many uploads; empty if it can.
        otherwise: what is done for a round with such a number. A round does not fail for it.
        leaves_out: whether it may leave out whole uploads.
    """

    reducer: Reducer = weighted_mean
    screens: tuple[Screen, ...] = ()
    problem: Callable[[int], str] = suits_any_number
    otherwise: Aggregator | None = None
    leaves_out: bool = False

    def suited_to(self, num_uploads: int) -> Aggregator:
        """This one, or what takes its place for so many uploads."""
        problem = self.problem(num_uploads)
        if not problem or self.otherwise is None:
            return self
        logger.warning("%s", problem)
        return self.otherwise.suited_to(num_uploads)


MEAN = Aggregator()
"""The weighted mean of all."""
