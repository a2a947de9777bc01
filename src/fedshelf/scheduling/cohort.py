"""Sampling of the cohort of a round."""

import itertools
import math
import random
from collections.abc import Mapping, Sequence

from fedshelf.core.choices import SamplingName
from fedshelf.core.rng import Rng


def size(population: int, *, fraction: float) -> int:
    """Size of a cohort: C·K rounded up, at least one (McMahan et al. 2017, Algorithm 1: max(C·K, 1))."""
    return min(population, max(1, math.ceil(round(fraction * population, 9))))


def population_for(count: int, *, fraction: float) -> int:
    """How many clients have to be live for a cohort of `count` at least."""
    return next(number for number in itertools.count(count) if size(number, fraction=fraction) >= count)


def over_selected(count: int, population: int, over_selection: float) -> int:
    """Number of clients to ask for `count` uploads: (1 + X) times as many, rounded up, at most all.

    Source: Bonawitz et al. 2019, "Towards Federated Learning at Scale: System Design".
    """
    return min(population, math.ceil(round((1 + over_selection) * count, 9)))


def draw(names: Sequence[str], count: int, rng: Rng, weights: Mapping[str, float] | None = None) -> tuple[str, ...]:
    """Sample `count` of `names` without replacement, sorted, independent of the order of `names`.

    Args:
        names: live clients.
        count: number of clients.
        rng: generator of this round and attempt.
        weights: positive weights for sequential sampling in proportion (Efraimidis and Spirakis 2006, algorithm A: the
            largest of u^(1/weight)); None samples uniformly.
    """
    generator = rng.python()
    if weights is None:
        return tuple(sorted(generator.sample(sorted(names), count)))
    keys = {name: math.log(1.0 - generator.random()) / weights[name] for name in sorted(names)}
    return tuple(sorted(sorted(keys, key=lambda name: -keys[name])[:count]))


def draw_independently(names: Sequence[str], probability: float) -> tuple[str, ...]:
    """Draw each name with the same probability, secretly; possibly none. Sorted.

    Differential privacy for clients assumes that nobody can tell who was drawn, so the run's seed plays no part.
    """
    generator = random.SystemRandom()
    return tuple(name for name in sorted(names) if generator.random() < probability)


def sampling_weights(
    sampling: SamplingName, names: Sequence[str], *, num_train: Mapping[str, int], times_live: Mapping[str, int],
    round: int,
) -> Mapping[str, float] | None:  # fmt: skip
    """The weights for `draw` in `round`; None for uniform sampling.

    Args:
        sampling: by `size`, in proportion to training photos; by `availability`, higher for clients that are rarely
            live, so that in the long run they take part as often as others.
        names: live clients.
        num_train: training photos, at least one each.
        times_live: number of previous rounds in which each client was live.
        round: from 1.
    """
    if sampling == "size":
        return {name: float(num_train[name]) for name in names}
    if sampling == "availability":
        return {name: round / (times_live.get(name, 0) + 1) for name in names}
    return None


def quorum(wanted: int, configured: int | None) -> int:
    """The number of uploads that a round needs by its deadline.

    Args:
        wanted: number of uploads that suffice.
        configured: the configured quorum, at most `wanted`; None: more than two thirds of 4 and more, 2 of 3, and all
            of fewer.
    """
    if configured is not None:
        return min(wanted, configured)
    return 2 * wanted // 3 + 1 if wanted >= 4 else min(wanted, 2)
