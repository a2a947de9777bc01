"""The same round code in one process, or over worker processes."""
