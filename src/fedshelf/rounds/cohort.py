"""Who takes part in a round."""

import math
from collections.abc import Sequence

from fedshelf.core.rng import Rng


def size(population: int, *, fraction: float, min_clients: int) -> int:
    """Members of a cohort: C·K rounded up (McMahan et al. 2017, Algorithm 1), at least `min_clients`, at most all."""
    return min(population, max(min_clients, math.ceil(round(fraction * population, 9))))


def draw(names: Sequence[str], count: int, rng: Rng) -> tuple[str, ...]:
    """`count` of `names` without replacement, uniformly, sorted; the order in which names arrive is no matter."""
    return tuple(sorted(rng.python().sample(sorted(names), count)))


def quorum(cohort: int, configured: int | None) -> int:
    """How many uploads a round needs by its deadline: as configured (at most the cohort), else 0.8 of the cohort
    rounded up."""
    return min(cohort, configured) if configured is not None else math.ceil(round(0.8 * cohort, 9))
