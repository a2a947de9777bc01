"""FedShelf: one product-recognition model trained over all stores, while photos never leave a store."""

import os

__version__ = "0.1.0"

# Before torch loads: OpenMP threads that spin while idle made training on a busy machine 12 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
