"""FedShelf: one product-recognition model trained over all stores, while photos never leave a store."""

__version__ = "0.1.0"
