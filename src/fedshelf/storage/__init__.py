"""Files that survive a crash: atomic writes, locks, checkpoints, spool, client state, run directories."""
