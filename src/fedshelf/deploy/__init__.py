"""The real transport: FedShelf's messages between machines, carried by Flower's engine.

Flower reads these two variables when it is imported, and a library of its tells of its plugins then; every module of
this room comes after these lines.
"""

import logging
import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
logging.getLogger("alembic").setLevel(logging.WARNING)
