"""Attacks on a store's own updates: what someone who sees them, and knows the run's settings, can learn.

An attack that fails proves nothing: others may succeed. One that succeeds is a fact.
"""
