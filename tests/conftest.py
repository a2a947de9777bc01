"""Fixtures that several folders of tests share."""

from tests.processes import drawn_pair, drawn_stores, drawn_test_photos, pair, site

__all__ = ["drawn_pair", "drawn_stores", "drawn_test_photos", "pair", "site"]
