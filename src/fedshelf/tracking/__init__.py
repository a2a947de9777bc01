"""What a run leaves behind: run directory, database, checkpoints, console."""
