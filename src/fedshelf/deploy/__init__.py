"""The real transport: messages between machines, carried by Flower's engine.

Flower reads these two environment variables when it is imported, and one of its libraries then logs its plugins. Every
module of this package is therefore imported after these lines.
"""

import logging
import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
logging.getLogger("alembic").setLevel(logging.WARNING)

ENGINE = "Flower's engine"


REPORTED = (
    "Invalid destination node ID for Message",  # a store has left, which the run reports by the store's name
    "Message with ID %s does not exist",  # a late answer, which the run reports as such
    "Failed to store Message reply: duplicate reply",  # an answer that was sent again after a break
)
"""How Flower's messages begin of which FedShelf reports the cause."""


def translated(record: logging.LogRecord) -> bool:
    """Whether to log a message of Flower's engine, which then says whose it is.

    Args:
        record: the message.
    """
    if str(record.msg).startswith(REPORTED):
        return False
    if not str(record.msg).startswith(ENGINE):
        record.msg = f"{ENGINE}: {record.msg}"
    return True


def quiet_engine_log() -> None:
    """Log Flower and its libraries through the root logger, without what FedShelf reports itself."""
    logging.getLogger("flwr").addFilter(translated)
    for name in ("flwr", "uvicorn", "httpx", "httpcore", "alembic"):
        engine_logger = logging.getLogger(name)
        for handler in list(engine_logger.handlers):
            engine_logger.removeHandler(handler)
        engine_logger.propagate = True
        engine_logger.setLevel(logging.WARNING)
