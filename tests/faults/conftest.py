"""Fixtures of the processes that these tests start."""

from tests.processes import drawn_pair, drawn_stores, drawn_test_photos, pair, site

__all__ = ["drawn_pair", "drawn_stores", "drawn_test_photos", "pair", "site"]
