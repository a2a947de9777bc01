"""What a transport wants from the engine around Flower's grid, and how to do without."""

import logging
import time
from collections.abc import Iterable
from typing import Protocol


class Engine(Protocol):
    """What a transport wants from the engine around the grid, beyond the documented API."""

    def wait(self, timeout: float) -> None:
        """Return when something may have arrived, or after `timeout` seconds."""

    def forget(self, message_ids: Iterable[str]) -> None:
        """Free messages that will never be answered."""

    def announce_end(self, reason: str) -> None:
        """Tell clients, busy ones too, that the run has ended."""

    def ended_by(self, node_id: int) -> str | None:
        """Which signal ended the process of a node that has left (see `core.ports.Left`)."""

    def signed_off(self, node_id: int) -> bool:
        """Whether a node that has left said so."""


class Polling:
    """The stock SuperLink: it tells nothing by itself, and frees messages at its own time."""

    def __init__(self, interval: float = 0.3) -> None:
        self._interval = interval

    def wait(self, timeout: float) -> None:
        time.sleep(min(timeout, self._interval))

    def forget(self, message_ids: Iterable[str]) -> None:
        pass

    def announce_end(self, reason: str) -> None:
        pass

    def ended_by(self, node_id: int) -> str | None:
        return None

    def signed_off(self, node_id: int) -> bool:
        return False


def quiet_engine_log() -> None:
    """Let Flower and its libraries log through the root logger, and only what matters: Flower tells each request."""
    for name in ("flwr", "uvicorn", "httpx", "httpcore", "alembic"):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
        logger.propagate = True
        logger.setLevel(logging.WARNING)
