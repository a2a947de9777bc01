"""Pure types that everything else is written on: torch and the standard library, nothing else."""
