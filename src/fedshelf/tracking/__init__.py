"""Everything a run records: run directory, database, checkpoints, and console output."""
