"""Crash-safe storage: atomic writes, locks, checkpoints, spool, client state, run directories."""
