"""Robust aggregation rules, under which a few hostile or broken clients cannot determine the model.

Coordinate median and trimmed mean: Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical
Rates", definitions 1 and 2. For n uploads u_1 .. u_n, in each coordinate k:

     1  median:        the middle of u_1[k] .. u_n[k]; for an even n the mean of the middle two
     2  trimmed mean:  without the c smallest and the c largest of them (c = floor(beta · n)), the mean of the others

Multi-Krum: Blanchard et al. 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", section 4.
For n uploads of which f may be hostile, n >= 2f + 3:

     3  s(i) <- sum of ||u_i - u_j||² over the n - f - 2 uploads j that are closest to i
     4  return the mean of the m uploads with the lowest s;  m = n - f

Norm bounding: Sun et al. 2019, "Can You Really Backdoor Federated Learning?", section 5:

     5  u_i <- u_i / max(1, ||u_i|| / B)

Median, trimmed mean and multi-Krum weight all uploads equally. A weight is the client's own claim of its number of
photos: a rule that trusts it lets one client claim a majority.

Differs from the papers: beta is `--trim`, and one assumption serves two rules: c = f = floor(trim · n), but at least 1
(if trim > 0), so that no rule silently becomes a plain mean for a small cohort; c leaves at least one row. Multi-Krum's
lines 3 and 4 apply to gradients in the paper; here an upload has parts (trainable values, batch-norm statistics,
control variates) of different scales, so line 3 is computed for each part, and line 4 ranks by the largest s(i) / s of
the parts, s being the (n - f)-th smallest score of that part: with one part that is the paper's order. A distance over
all parts together would be dominated by the part with the largest numbers, and a client could then poison the others
undetected; s cannot be driven up by f clients, because n - f honest scores exist. If n < 2f + 3, the round uses the
coordinate median and reports that. m is a free choice in the paper; n - f is that of its experiments. Line 5 bounds the
trainable part (no noise is added). Other parts have no configured bound: each is bounded by the median of its norms in
the cohort. Changes of batch-norm statistics have the scale of activations rather than weights: under a common bound
they would dominate the norm in one model and never reach it in another. `AutoNormBound` sets B for each part to a
multiple of its median norm in the cohort.

Shapes: b values of a block, n uploads, [T] etc. of a part's row.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from fedshelf.algorithms.reduce import (
    AT_ONCE,
    TIMES_MEDIAN,
    Aggregator,
    Parts,
    Screen,
    Verdict,
    norm,
    plain_mean,
    quick_norm,
)
from fedshelf.core.settings import Scope, Setting
from fedshelf.core.text import counted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

TRIM = Setting(
    help="Assumed share of hostile uploads in a round, which are cut at each end or left out.", ge=0, lt=0.5,
    scope=Scope.SERVER,
)  # fmt: skip
MIN_UPLOADS = 4


def num_assumed(num_uploads: int, trim: float) -> int:
    """Number of uploads assumed to be hostile: the share `trim`, rounded down, but at least 1 (0 if `trim` is 0)."""
    return max(1, math.floor(trim * num_uploads + 1e-9)) if trim > 0 else 0  # 0.29 · 100 is a little less than 29


def coordinate_median(rows: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The unweighted median [b] of `rows` (each [b]) in each coordinate."""
    return _mean_of_middle(rows, cut=(len(rows) - 1) // 2)  # line 1: one row is left, or two


@dataclass(frozen=True, slots=True)
class TrimmedMean:
    """A reducer: the mean in each coordinate after the share `trim` (below 0.5) is cut at each end.

    At least one upload of three or more is cut at each end, and none of two or one, which have no majority.
    """

    trim: float

    def __call__(self, rows: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        return _mean_of_middle(rows, cut=min(num_assumed(len(rows), self.trim), (len(rows) - 1) // 2))  # line 2


@dataclass(frozen=True, slots=True)
class MultiKrum:
    """A screen that leaves out the uploads farthest from their neighbors, as many as are assumed to be hostile."""

    trim: float

    def __call__(self, parts: Parts) -> list[Verdict]:
        num_uploads = len(next(iter(parts.values())))
        num_left_out = num_assumed(num_uploads, self.trim)
        if not num_left_out:
            return [Verdict()] * num_uploads
        farthest = [(0.0, "")] * num_uploads  # by upload: its largest ratio, and the part with it
        for part, rows in parts.items():
            ratios = _ratios(krum_scores(squared_distances(rows), num_left_out), num_uploads - num_left_out)
            farthest = [max(known, (ratio, part)) for known, ratio in zip(farthest, ratios, strict=True)]
        order = sorted(range(num_uploads), key=lambda i: (farthest[i][0], i))  # line 4; ties by name
        selected = set(order[: num_uploads - num_left_out])
        return [Verdict() if i in selected else _krum_verdict(*farthest[i]) for i in range(num_uploads)]

    def problem(self, num_uploads: int) -> str:
        """Why the rule cannot work with a number of uploads; empty if it can."""
        assumed = num_assumed(num_uploads, self.trim)
        if not assumed or num_uploads >= 2 * assumed + 3:
            return ""
        return (
            f"multi-krum needs {counted(2 * assumed + 3, 'upload')} to leave out {assumed} and has {num_uploads}: the "
            "coordinate median is taken for this round (--trim is the share that is assumed to be hostile)"
        )


@dataclass(frozen=True, slots=True)
class NormBound:
    """A screen that scales trainable parts down to the norm `bound`, and each other part to its median norm."""

    bound: float

    def __call__(self, parts: Parts) -> list[Verdict]:
        from fedshelf.core.messages import TRAINABLE

        norms = _norms(parts)
        limits = {part: self.bound if part == TRAINABLE else statistics.median(norms[part]) for part in parts}
        return _bound_verdicts(norms, limits)


@dataclass(frozen=True, slots=True)
class AutoNormBound:
    """A screen that scales each part down to `TIMES_MEDIAN` times its median norm.

    It leaves honest uploads as they are, unlike `NormBound`. Fewer than `MIN_UPLOADS` have no meaningful median, and
    neither has a part that most uploads leave at zero.
    """

    def __call__(self, parts: Parts) -> list[Verdict]:
        num_uploads = len(next(iter(parts.values())))
        if num_uploads < MIN_UPLOADS or all(_are_alike([*map(quick_norm, rows)]) for rows in parts.values()):
            return [Verdict()] * num_uploads
        norms = _norms(parts)
        limits = {part: TIMES_MEDIAN * statistics.median(found) or math.inf for part, found in norms.items()}
        return _bound_verdicts(norms, limits)


MEDIAN = Aggregator(reducer=coordinate_median)


def trimmed_mean(*, trim: Annotated[float, TRIM] = 0.25) -> Aggregator:
    """The trimmed mean."""
    return Aggregator(reducer=TrimmedMean(trim))


def multi_krum(*, trim: Annotated[float, TRIM] = 0.25) -> Aggregator:
    """Multi-Krum."""
    krum = MultiKrum(trim)
    return Aggregator(reducer=plain_mean, screens=(krum,), problem=krum.problem, otherwise=MEDIAN, leaves_out=True)


def bounded(aggregator: Aggregator, bound: Screen) -> Aggregator:
    """Apply `bound` to uploads for `aggregator` and its replacements (multi-Krum selects before that)."""
    otherwise = aggregator.otherwise and bounded(aggregator.otherwise, bound)
    return replace(aggregator, screens=(*aggregator.screens, bound), otherwise=otherwise)


def squared_distances(rows: Sequence[Tensor], *, at_once: int = AT_ONCE) -> Tensor:
    """The squared distances [n, n] between `rows`, in float64, from their inner products.

    Cancellation errors are relative to the norms of the two rows (1e-16 of their squares), so a huge row only affects
    its own distances.
    """
    import torch

    products = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    block = max(1, at_once // len(rows))
    for start in range(0, len(rows[0]), block):
        values = torch.stack([row[start : start + block] for row in rows]).double()
        products += values @ values.T
    squares = products.diagonal()
    return (squares[:, None] + squares[None, :] - 2 * products).clamp_(min=0)


def krum_scores(distances: Tensor, num_hostile: int) -> list[float]:
    """Line 3, from squared distances [n, n]: each upload's sum over its n - f - 2 closest others."""
    others = distances.clone().fill_diagonal_(math.inf).sort(dim=1).values
    scores: list[float] = others[:, : len(distances) - num_hostile - 2].sum(dim=1).tolist()
    return scores


def _norms(parts: Parts) -> dict[str, list[float]]:
    return {part: [norm(row) for row in rows] for part, rows in parts.items()}


def _are_alike(norms: Sequence[float]) -> bool:
    """Whether none of the approximate norms is near `TIMES_MEDIAN` times their median."""
    return max(norms) == 0 or max(norms) < 0.99 * TIMES_MEDIAN * statistics.median(norms) < math.inf


def _ratios(scores: Sequence[float], num_selected: int) -> list[float]:
    """Scores relative to the largest one that the rule would select by these scores only."""
    unit = sorted(scores)[num_selected - 1]
    return [score / unit if unit else (math.inf if score else 0.0) for score in scores]


def _mean_of_middle(rows: Sequence[Tensor], *, cut: int) -> Tensor:
    """The mean in each coordinate without the `cut` smallest and largest.

    Accumulated sequentially in float64, so that the block size does not matter.
    """
    import numpy as np

    result = rows[0].new_empty(len(rows[0]))
    for start, columns in _sorted_columns(rows):
        total = np.zeros(len(columns), dtype=np.float64)
        for i in range(cut, len(rows) - cut):
            total += columns[:, i]
        total /= len(rows) - 2 * cut
        result.numpy()[start : start + len(columns)] = total
    return result


def _sorted_columns(rows: Sequence[Tensor]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield the start of each block, and its values sorted per coordinate."""
    import numpy as np

    block = max(1, AT_ONCE // len(rows))
    for start in range(0, len(rows[0]), block):
        columns = np.stack([row[start : start + block].numpy() for row in rows], axis=1)
        columns.sort(axis=1)
        yield start, columns


def _krum_verdict(ratio: float, part: str) -> Verdict:
    reason = f"left out by multi-krum: its {part} values score {ratio:.3g} times the limit"
    return Verdict(left_out=True, reason=reason)


def _bound_verdicts(norms: Mapping[str, Sequence[float]], limits: Mapping[str, float]) -> list[Verdict]:
    """Line 5 for each upload, by the norms of its parts."""
    uploads = [dict(zip(norms, of_one, strict=True)) for of_one in zip(*norms.values(), strict=True)]
    return [_bound_verdict(upload, limits) for upload in uploads]


def _bound_verdict(norms: Mapping[str, float], limits: Mapping[str, float]) -> Verdict:
    """Line 5 for the parts of one upload."""
    factors = {part: limits[part] / norms[part] for part in norms if norms[part] > limits[part]}
    told = ", ".join(f"{part} from {norms[part]:.3g} to {limits[part]:.3g}" for part in factors)
    return Verdict(factors=factors, reason=f"norm bounded: {told}" if told else "")
