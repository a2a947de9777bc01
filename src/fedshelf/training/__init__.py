"""The training loop (there is only one) and evaluation."""
