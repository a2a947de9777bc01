"""What a command says when a run has ended."""

import sys

import typer

from fedshelf.core.events import RunStatus
from fedshelf.tracking.run_directory import RunDirectory


def conclude(status: RunStatus, directory: RunDirectory, *, as_json: bool) -> None:
    """Say where the model is, or how to go on; a stopped run ends with exit code 1."""
    if not as_json:
        if status is RunStatus.FINISHED:
            typer.echo(f"Model: {directory.model}")
            typer.echo(f"Rounds: fedshelf runs show {directory.path}")
        else:
            typer.echo("Stopped. The same command goes on where this one ended.", err=True)
    if status is not RunStatus.FINISHED:
        sys.exit(1)
