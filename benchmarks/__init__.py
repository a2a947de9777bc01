"""Measures FedShelf against what the hardware allows, on the same machine in the same run."""
