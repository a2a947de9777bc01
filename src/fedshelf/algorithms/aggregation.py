"""Folding the spooled uploads of a round: in the order of client names, in coordinate blocks.

So the order of arrival changes not one bit, and server memory does not grow with the cohort: an upload is read
from where it is spooled, block by block.

Shapes: S shared values, b values of a block.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fedshelf.algorithms.base import Aggregate, Reducer
from fedshelf.algorithms.reduce import Aggregator, Parts, Screen, Verdict
from fedshelf.core.messages import AUXILIARY, STATISTICS, TRAINABLE, Upload

BLOCK = 1 << 18  # values: large enough to be worth two threads, small enough for the third-level cache
SCALED = 1 << 24  # values of scaled blocks, which are copies, at once, however many uploads there are


class Combination(NamedTuple):
    """What uploads amount to, and what the screens found about each of them."""

    aggregate: Aggregate
    verdicts: Sequence[Verdict]


def combine(
    uploads: Sequence[Upload], weights: Sequence[float], aggregator: Aggregator, *, num_trainable: int,
    statistics: Sequence[Tensor] | None = None,
) -> Combination:  # fmt: skip
    """What `uploads` (in the order of client names) amount to.

    Args:
        uploads: checked ones.
        weights: of the deltas, positive; what uploads carry beside them counts alike.
        aggregator: how they become one. Uploads that it leaves out are left out whole, with what they carry beside
            their deltas, and the weights of the others are normalized without them.
        num_trainable: T of the layout.
        statistics: [S - T] each, in place of those of the deltas.
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


def normalized(upload: Upload, share: float, *, num_trainable: int) -> Upload:
    """`upload` as the configured work, of which `share` was done, would have made it: its trainable part, divided by
    that (`scheduling.workload` says why). Statistics and what travels beside the delta are means already: they stay."""
    if share == 1:
        return upload
    delta, largest = upload.delta.clone(), torch.finfo(upload.delta.dtype).max
    delta[:num_trainable].div_(share).clamp_(-largest, largest)  # what came in finite stays so
    return upload.with_vectors(delta=delta)


def stretched(aggregate: Aggregate, length: float) -> Aggregate:
    """`aggregate`, made of normalized uploads, with a trainable part of the `length` that the round's mean work has."""
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
        deltas: may be views of files; they are read once, in blocks.
        weights: unnormalized, positive.
        reducer: works on one block.
        factors: what each of the deltas is multiplied by first.
        into: where the result is written; a new vector if it is not given.
        block: values at once.
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
    """The uploads' vectors part by part, without copying."""
    return {
        TRAINABLE: [upload.delta[:num_trainable] for upload in uploads],
        STATISTICS: [upload.delta[num_trainable:] for upload in uploads],
        **{AUXILIARY + name: [upload.auxiliary[name] for upload in uploads] for name in uploads[0].auxiliary},
    }


def _screen(parts: Parts, screens: Sequence[Screen], num_uploads: int) -> list[Verdict]:
    """What `screens`, one after the other, find about each upload."""
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
    """The weighted mean of the values that are there, of (value, weight), added up in this order; None if there are
    none."""
    known = [(value, weight) for value, weight in pairs if value is not None]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else None
