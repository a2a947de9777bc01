"""The real transport: messages between machines, carried by Flower's engine.

Flower reads these two environment variables when it is imported, and one of its libraries then logs its plugins. Every
module of this package is therefore imported after these lines.
"""

import logging
import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
logging.getLogger("alembic").setLevel(logging.WARNING)


def quiet_engine_log() -> None:
    """Log Flower and its libraries through the root logger, without their per-request messages."""
    for name in ("flwr", "uvicorn", "httpx", "httpcore", "alembic"):
        engine_logger = logging.getLogger(name)
        for handler in list(engine_logger.handlers):
            engine_logger.removeHandler(handler)
        engine_logger.propagate = True
        engine_logger.setLevel(logging.WARNING)
