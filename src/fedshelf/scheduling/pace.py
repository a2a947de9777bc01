"""How fast clients are, as the server has seen it: seconds per local step, from being sent a task to the upload.

What is measured is the whole way (download, waiting for the machine, training, upload), by the server's own timer,
and the steps are those that the server has asked for: what a client says of itself decides nothing. Pure functions on
the mapping that `ServerState.pace` keeps.
"""

import statistics
from collections.abc import Collection, Mapping

NEWEST = 0.5  # weight of an observation in the mean: what was before it counts half as much each time
LEAST = 1e-9  # seconds per step: predictions divide by it


def per_step(seconds: float, num_steps: int) -> float:
    """The pace of `num_steps` that took `seconds`."""
    return max(LEAST, seconds / num_steps)


def updated(
    pace: Mapping[str, float], *, seen: Mapping[str, float], at_least: Mapping[str, float]
) -> dict[str, float]:  # fmt: skip
    """The paces after a round.

    Args:
        pace: before it; exponential means.
        seen: the paces of those whose upload came in.
        at_least: of those who had not answered when the round ended, what their pace is no smaller than: without it, a
            client that is always late would never be known to be slow.
    """
    found = dict(pace)
    for name, observed in seen.items():
        found[name] = NEWEST * observed + (1 - NEWEST) * found.get(name, observed)
    for name, bound in at_least.items():
        found[name] = max(bound, found.get(name, bound))
    return found


def predicted(pace: Mapping[str, float], names: Collection[str]) -> dict[str, float]:
    """The pace of each of `names`. One that was never seen has the median of the others; where nobody was, nothing is
    predicted."""
    if not pace:
        return {}
    usual = statistics.median(pace.values())
    return {name: pace.get(name, usual) for name in names}
