"""Scheduling of rounds: which clients take part, with how much work, and how long to wait."""
