"""Stores that are late again and again. Who cannot keep a deadline misses the next one, too, and is left out of the
model for good; a line for each round says so only to those who read them all."""

from collections.abc import Iterable, Mapping
from typing import Protocol

from fedshelf.core.events import ClientStatus
from fedshelf.core.text import printable

HABIT = 5
"""Times in a row that are no accident: with over-selection, one of many alike stores is soon late three times."""
MOST_NAMES = 8  # in one sentence


class Member(Protocol):
    """What counts of a client's part in a round."""

    @property
    def client(self) -> str: ...
    @property
    def status(self) -> ClientStatus: ...


class StragglerTracker:
    """Counts, for each client, how often it was late since it was last counted. Rounds that it was not drawn for, or
    was offline in, say nothing about that."""

    def __init__(self) -> None:
        self._times: dict[str, int] = {}

    def add(self, members: Iterable[Member]) -> Mapping[str, int]:
        """Take in the next finished round; return for whom it has become a habit just now, and how often they were
        late."""
        members = tuple(members)
        counted = {member.client for member in members if member.status is ClientStatus.COUNTED}
        late = {member.client for member in members if member.status is ClientStatus.LATE} - counted
        for name in counted:
            self._times.pop(name, None)
        for name in late:
            self._times[name] = self._times.get(name, 0) + 1
        return {name: HABIT for name in sorted(late) if self._times[name] == HABIT}

    def habits(self) -> Mapping[str, int]:
        """For whom it is a habit, and how often they were late."""
        return {name: times for name, times in sorted(self._times.items()) if times >= HABIT}


def advice(habits: Mapping[str, int]) -> str:
    """What to say of them, and what helps; nothing where there are none."""
    if not habits:
        return ""
    named = [f"{printable(name)} ({times} times in a row)" for name, times in habits.items()]
    more = f" and {len(named) - MOST_NAMES} more" if len(named) > MOST_NAMES else ""
    return (
        f"late again and again: {', '.join(named[:MOST_NAMES])}{more}. What they train is thrown away: give them "
        "more time (--round-timeout, --straggler-factor, --max-staleness) or less to do (--local-work dynamic)"
    )
