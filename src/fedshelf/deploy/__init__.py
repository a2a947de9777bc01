"""The real transport: FedShelf's messages between machines, carried by Flower's engine.

Flower reads these two variables when it is imported; every module of this room imports it after them.
"""

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
