"""Detects stores that are late repeatedly.

A client that cannot meet a deadline also misses the next one, so the model permanently lacks its data. The per-round
lines alone do not make this obvious.
"""

from collections.abc import Iterable, Mapping

from fedshelf.core.events import ClientStatus, Participation
from fedshelf.core.text import printable

HABIT = 5
"""Consecutive late rounds that are not chance: with over-selection, similar stores are soon late three times."""
MOST_NAMES = 8  # maximum number of names in a sentence


class StragglerTracker:
    """Counts how often each client was late since it was last counted.

    Rounds in which it was offline or not drawn are ignored.
    """

    def __init__(self) -> None:
        self._times: dict[str, int] = {}

    def add(self, members: Iterable[Participation]) -> Mapping[str, int]:
        """Add a finished round.

        Args:
            members: the round's clients.

        Returns:
            The clients that have just become stragglers, and how often they were late.
        """
        members = tuple(members)
        counted = {member.client for member in members if member.status is ClientStatus.COUNTED}
        late = {member.client for member in members if member.status is ClientStatus.LATE} - counted
        for name in counted:
            self._times.pop(name, None)
        for name in late:
            self._times[name] = self._times.get(name, 0) + 1
        return {name: HABIT for name in sorted(late) if self._times[name] == HABIT}

    def habits(self) -> Mapping[str, int]:
        """Return all stragglers, and how often they were late."""
        return {name: times for name, times in sorted(self._times.items()) if times >= HABIT}


def advice(habits: Mapping[str, int]) -> str:
    """Describe the stragglers and what helps; empty if there are none."""
    if not habits:
        return ""
    named = [f"{printable(name)} ({times} times in a row)" for name, times in habits.items()]
    more = f" and {len(named) - MOST_NAMES} more" if len(named) > MOST_NAMES else ""
    return (
        f"late again and again: {', '.join(named[:MOST_NAMES])}{more}. What they train is thrown away: give them "
        "more time (--round-timeout, --straggler-factor, --max-staleness) or less to do (--local-work dynamic)"
    )
