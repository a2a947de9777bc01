"""What a transport needs from the engine around Flower's grid, and a fallback."""

import logging
import time
from collections.abc import Iterable
from typing import Protocol


class Engine(Protocol):
    """What a transport needs from the engine around the grid, beyond the documented API."""

    def wait(self, timeout: float) -> None:
        """Return when something may have arrived, or after `timeout` seconds."""

    def forget(self, message_ids: Iterable[str]) -> None:
        """Free messages that will never be answered."""

    def announce_end(self, reason: str) -> None:
        """Tell all clients, including busy ones, that the run has ended."""

    def ended_by(self, node_id: int) -> str | None:
        """Return the signal that ended the process of a node that has left (see `core.ports.Left`)."""

    def signed_off(self, node_id: int) -> bool:
        """Whether a node that has left signed off."""


class Polling:
    """The stock SuperLink, which has no notifications and frees messages on its own schedule.

    Args:
        interval: seconds between polls.
    """

    def __init__(self, interval: float = 0.3) -> None:
        self._interval = interval

    def wait(self, timeout: float) -> None:
        """Sleep for the polling interval, at most `timeout` seconds."""
        time.sleep(min(timeout, self._interval))

    def forget(self, message_ids: Iterable[str]) -> None:
        """Do nothing: the SuperLink frees messages itself."""

    def announce_end(self, reason: str) -> None:
        """Do nothing: the SuperLink cannot reach busy clients."""

    def ended_by(self, node_id: int) -> str | None:
        """Return None: unknown."""
        return None

    def signed_off(self, node_id: int) -> bool:
        """Return False: unknown."""
        return False


def quiet_engine_log() -> None:
    """Log Flower and its libraries through the root logger, without their per-request messages."""
    for name in ("flwr", "uvicorn", "httpx", "httpcore", "alembic"):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
        logger.propagate = True
        logger.setLevel(logging.WARNING)
