"""Serves a model file in the store. Nothing here imports torch."""
