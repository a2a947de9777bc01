"""The single training loop, and evaluation."""
