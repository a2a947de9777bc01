"""The pace of clients as measured by the server: seconds per local step, from dispatch to upload.

The measurement includes everything (download, waiting for the machine, training, upload) by the server's own timer, and
counts the steps that the server assigned, so that a client's own claims have no effect. Pure functions on the mapping
in `ServerState.pace`.
"""

import statistics
from collections.abc import Collection, Mapping

NEWEST = 0.5  # weight of a new observation in the exponential mean
LEAST = 1e-9  # seconds per step: predictions divide by it


def per_step(seconds: float, num_steps: int) -> float:
    """The pace of `num_steps` that took `seconds`."""
    return max(LEAST, seconds / num_steps)


def updated(
    pace: Mapping[str, float], *, seen: Mapping[str, float], at_least: Mapping[str, float]
) -> dict[str, float]:  # fmt: skip
    """Update the paces after a round.

    Args:
        pace: exponential means before the round.
        seen: paces of clients whose upload arrived.
        at_least: lower bounds for clients that had not replied; without them, a client that is always late would never
            be known to be slow.
    """
    found = dict(pace)
    for name, observed in seen.items():
        found[name] = NEWEST * observed + (1 - NEWEST) * found.get(name, observed)
    for name, bound in at_least.items():
        found[name] = max(bound, found.get(name, bound))
    return found


def predicted(pace: Mapping[str, float], names: Collection[str]) -> dict[str, float]:
    """The predicted pace of each of `names`: the median of all for unknown clients; empty if no client is known."""
    if not pace:
        return {}
    usual = statistics.median(pace.values())
    return {name: pace.get(name, usual) for name in names}
