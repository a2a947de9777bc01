"""The log of Flower and of the libraries below it, as part of ours."""

import logging


def quiet_engine_log() -> None:
    """Let Flower and its libraries log through the root logger, and only what matters: Flower tells each request."""
    for name in ("flwr", "uvicorn", "httpx", "httpcore", "alembic"):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
        logger.propagate = True
        logger.setLevel(logging.WARNING)
