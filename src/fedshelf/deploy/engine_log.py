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
    logging.getLogger("uvicorn.error").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Not that a server that stops cuts off connections: only clients that are gone, or hang, have left any."""
    return not record.getMessage().startswith("Cancel ")
