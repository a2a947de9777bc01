"""Aggregation of a round's spooled uploads, in the order of client names and in coordinate blocks.

The result is therefore bit for bit independent of the order of arrival, and server memory does not grow with the
cohort: uploads are read from the spool block by block.

Shapes: S shared values, b values of a block.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from fedshelf.algorithms.base import Aggregate, Reducer
from fedshelf.algorithms.reduce import TIMES_MEDIAN, Aggregator, Parts, Screen, Verdict, norm
from fedshelf.core.messages import AUXILIARY, STATISTICS, TRAINABLE, Upload

TIMES_COUNT = 10  # the largest number of photos that a client can claim, as a multiple of the cohort's median
BLOCK = 1 << 18  # values: large enough for two threads, small enough for the third-level cache
SCALED = 1 << 24  # values of scaled blocks (copies) in memory at once, for any number of uploads


class Combination(NamedTuple):
    """The aggregate of uploads, and the screens' verdict on each.

    Attributes:
        aggregate: the aggregate.
        verdicts: one per upload.
    """

    aggregate: Aggregate
    verdicts: Sequence[Verdict]


def combine(
    uploads: Sequence[Upload], weights: Sequence[float], aggregator: Aggregator, *, num_trainable: int,
    statistics: Sequence[Tensor] | None = None,
) -> Combination:  # fmt: skip
    """Aggregate `uploads` (in the order of client names).

    Args:
        uploads: validated uploads.
        weights: positive weights of the deltas; the algorithm's auxiliary vectors are weighted equally.
        aggregator: aggregates the uploads. Uploads that it leaves out are ignored as a whole, including their auxiliary
            vectors, and the weights of the others are normalized without them.
        num_trainable: T of the layout.
        statistics: [S - T] each, instead of those of the deltas.
    """
    aggregator = aggregator.suited_to(len(uploads))
    parts = _parts(uploads, num_trainable)
    if statistics is not None:
        parts[STATISTICS] = statistics
    verdicts = _screen({part: rows for part, rows in parts.items() if len(rows[0])}, aggregator.screens, len(uploads))
    kept = [i for i, verdict in enumerate(verdicts) if not verdict.left_out]

    def folded(part: str, weights: Sequence[float], into: Tensor) -> Tensor:
        return fold(
            [parts[part][i] for i in kept], [weights[i] for i in kept], aggregator.reducer,
            factors=[verdicts[i].factors.get(part, 1.0) for i in kept], into=into,
        )  # fmt: skip

    delta, alike = torch.empty_like(uploads[0].delta), [1.0] * len(uploads)
    for part, place in ((TRAINABLE, delta[:num_trainable]), (STATISTICS, delta[num_trainable:])):
        folded(part, weights, place)
    auxiliary = {
        name: folded(AUXILIARY + name, alike, torch.empty_like(vector)) for name, vector in uploads[0].auxiliary.items()
    }
    aggregate = Aggregate(
        delta=delta, num_clients=len(kept), num_trainable=num_trainable, auxiliary=auxiliary,
        mean_weight=sum(weights[i] for i in kept) / len(kept),
    )  # fmt: skip
    return Combination(aggregate, verdicts)


def capped(counts: Sequence[int], others: Sequence[int] = ()) -> list[int]:
    """Bound claimed numbers of photos to `TIMES_COUNT` times their median, so that no claim decides a model alone.

    Fewer than three have no meaningful median, and are unchanged.

    Args:
        counts: claims.
        others: claims of further clients, for the median.
    """
    known = (*counts, *others)
    most = max(1, int(TIMES_COUNT * median(known))) if len(known) >= 3 else max(known, default=0)
    return [min(count, most) for count in counts]


def outliers(uploads: Sequence[Upload], clients: Sequence[str], num_trainable: int) -> dict[str, str]:
    """The clients whose uploads are in some part far larger than those of the others, and may have destroyed a model.

    Args:
        uploads: validated uploads.
        clients: the client of each.
        num_trainable: T of the layout.

    Returns:
        By client, why it stands out.
    """
    found = {}
    for part, rows in _parts(uploads, num_trainable).items():
        norms: dict[str, float] = {}
        for client, row in zip(clients, rows, strict=True):
            norms[client] = max(norms.get(client, 0.0), norm(row))
        for client, own in norms.items():
            others = [other for name, other in norms.items() if name != client]
            usual = median(others) if others else 0.0
            if own > TIMES_MEDIAN * usual:
                found[client] = f"its {part} values have the norm {own:.3g}, the median of the others is {usual:.3g}"
    return found


def normalized(upload: Upload, share: float, *, num_trainable: int) -> Upload:
    """Scale an upload's trainable part from the `share` of work done to the configured work.

    Statistics and auxiliary vectors are means already, and are unchanged. See `scheduling.workload`.

    Args:
        upload: the upload.
        share: length of its training, as a multiple of the configured.
        num_trainable: T of the layout.
    """
    if share == 1:
        return upload
    delta, largest = upload.delta.clone(), torch.finfo(upload.delta.dtype).max
    delta[:num_trainable].div_(share).clamp_(-largest, largest)  # keeps finite values finite
    return upload.with_vectors(delta=delta)


def rescaled(aggregate: Aggregate, length: float) -> Aggregate:
    """Scale the trainable part of an aggregate of normalized uploads to the `length` of the round's mean work."""
    if length == 1:
        return aggregate
    delta = aggregate.delta.clone()
    delta[: aggregate.num_trainable] *= length
    return replace(aggregate, delta=delta)


def fold(
    deltas: Sequence[Tensor], weights: Sequence[float], reducer: Reducer, *, factors: Sequence[float] | None = None,
    into: Tensor | None = None, block: int = BLOCK,
) -> Tensor:  # fmt: skip
    """Reduce `deltas` (each [S], in the order of client names) to one vector [S].

    Args:
        deltas: may be views of files; read once, in blocks.
        weights: positive, not normalized.
        reducer: reduces one block.
        factors: factor on each delta before reduction.
        into: output vector; by default a new one.
        block: values per block.
    """
    total = sum(weights)
    normalized = [weight / total for weight in weights]
    factors = factors or [1.0] * len(deltas)
    if any(factor != 1 for factor in factors):
        block = min(block, max(1, SCALED // len(deltas)))
    result = torch.empty_like(deltas[0]) if into is None else into
    for start in range(0, len(result), block):
        rows = [delta[start : start + block] for delta in deltas]
        scaled = [row if factor == 1 else row * factor for row, factor in zip(rows, factors, strict=True)]
        result[start : start + block] = reducer(scaled, normalized)
    return result


def _parts(uploads: Sequence[Upload], num_trainable: int) -> dict[str, Sequence[Tensor]]:
    """The uploads' vectors by part, without copying."""
    return {
        TRAINABLE: [upload.delta[:num_trainable] for upload in uploads],
        STATISTICS: [upload.delta[num_trainable:] for upload in uploads],
        **{AUXILIARY + name: [upload.auxiliary[name] for upload in uploads] for name in uploads[0].auxiliary},
    }


def _screen(parts: Parts, screens: Sequence[Screen], num_uploads: int) -> list[Verdict]:
    """Apply `screens` in order, and return the verdict on each upload."""
    verdicts = [Verdict()] * num_uploads
    for screen in screens:
        kept = [i for i, verdict in enumerate(verdicts) if not verdict.left_out]
        found = screen({part: [rows[i] for i in kept] for part, rows in parts.items()})
        for i, verdict in zip(kept, found, strict=True):
            verdicts[i] = verdicts[i].then(verdict)
    if all(verdict.left_out for verdict in verdicts):
        raise ValueError("the screens left out every upload: there is nothing to make a model of")
    return verdicts


def weighted(pairs: Iterable[tuple[float | None, float]]) -> float | None:
    """The weighted mean of (value, weight) pairs with a value, summed in this order; None if there are none."""
    known = [(value, weight) for value, weight in pairs if value is not None]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else None
