"""Interprets a run's results: gains per store, stragglers, and number formatting."""
