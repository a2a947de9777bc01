"""A run's configuration: schema, TOML files, and default locations."""
