"""Flower loads typer, and typer's pinned version uses what newer click deprecates: neither is ours to mend."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import typer  # noqa: F401
