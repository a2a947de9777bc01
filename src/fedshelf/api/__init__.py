"""The public Python API, whose names are attributes of `fedshelf`."""
