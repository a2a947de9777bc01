"""Personalization: which tensors stay at a store, and how they are trained. One file per paper."""
