"""The real transport: messages between machines, carried by Flower's engine.

Flower reads these two environment variables when it is imported, and one of its libraries then logs its plugins. Every
module of this package is therefore imported after these lines.
"""

import logging
import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
logging.getLogger("alembic").setLevel(logging.WARNING)
