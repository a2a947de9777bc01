"""Which tensors stay at a store, and how they are trained. One paper, one file."""
