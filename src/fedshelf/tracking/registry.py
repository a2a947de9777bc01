"""Registry of optional sinks by name. A run always has its database, and a console or JSON on standard output."""

SINKS: dict[str, str] = {}
"""Components (`core.settings`) that make a `MetricSink`, each used if its first setting is set; none so far."""
