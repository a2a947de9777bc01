"""Did two programs do the same work? Their losses say so; accuracy alone would not.

Training amplifies roundings: peers that add up in float32, in another order, or with two threads, agree with the plain
loop in the first round and drift apart by some 1e-3 from the second on. A peer that trained other photos, from other
weights, at another rate or without averaging differs by 1e-2 and more in the first rounds already.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.measure import Sample

TOLERANCE = 1e-4  # nats, between losses of the same round
DRIFT = 0.02  # nats, a peer's losses after the first round


class DifferentWorkError(Exception):
    """The two sides did not do the same work: their times mean nothing."""


@dataclass(frozen=True, kw_only=True)
class Distance:
    """The largest difference in training loss (nats): in the first round, and in all."""

    first: float
    all: float


def of_ours(ours: Sample, limit: Sample) -> float:
    """The largest difference between FedShelf's and the plain loop's losses of a round.

    Raises:
        DifferentWorkError: it is above the tolerance, or the accuracies or the numbers of rounds differ.
    """
    differences = {}
    for name in ("train_loss", "test_accuracy"):
        pair: tuple[Sequence[float], Sequence[float]] = (ours.figures.get(name, []), limit.figures.get(name, []))
        if len(pair[0]) != len(pair[1]):
            raise DifferentWorkError(f"{name}: FedShelf reports {len(pair[0])} rounds, the plain loop {len(pair[1])}")
        differences[name] = max((abs(a - b) for a, b in zip(*pair, strict=True)), default=0.0)
    if max(differences.values()) > TOLERANCE:
        raise DifferentWorkError(
            f"FedShelf and the plain loop disagree by up to {differences['train_loss']:.2g} in training loss and "
            f"{differences['test_accuracy']:.2g} in test accuracy ({TOLERANCE:g} is allowed): they did not train alike"
        )
    return differences["train_loss"]


def of_peer(peer: Sample, limit: Sample) -> Distance:
    """How far a peer's losses are from the plain loop's, over the rounds that it ran.

    Raises:
        DifferentWorkError: further than roundings explain.
    """
    losses = peer.figures["train_loss"]
    expected = limit.figures["train_loss"][: len(losses)]
    if not losses or len(losses) != len(expected):
        raise DifferentWorkError(f"it reports {len(losses)} rounds, the plain loop {len(expected)}")
    differences = [abs(a - b) for a, b in zip(losses, expected, strict=True)]
    distance = Distance(first=differences[0], all=max(differences))
    if distance.first > TOLERANCE or distance.all > DRIFT:
        raise DifferentWorkError(
            f"its training losses are off by {distance.first:.2g} in the first round ({TOLERANCE:g} is allowed) and by "
            f"{distance.all:.2g} at most ({DRIFT:g}): it did not do the same work"
        )
    return distance
