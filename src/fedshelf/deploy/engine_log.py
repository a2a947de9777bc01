"""Flower's log, as part of ours: no handlers of its own, and only what matters."""

import logging


def quiet_engine_log() -> None:
    """Route Flower's logger through the root logger, warnings and errors only (the engine tells each request)."""
    logger = logging.getLogger("flwr")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    logger.propagate = True
    logger.setLevel(logging.WARNING)
