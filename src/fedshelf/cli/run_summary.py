"""What a command says when a run has ended."""

import sys
from pathlib import Path

import typer

from fedshelf.core.events import RunStatus
from fedshelf.storage.run_directory import RunDirectory


def conclude(status: RunStatus, directory: RunDirectory, *, as_json: bool) -> None:
    """Say where the model is, or how to go on; a stopped run ends with exit code 1."""
    if not as_json:
        if status is RunStatus.FINISHED:
            typer.echo(f"Model: {directory.model}")
            if directory.stores.is_dir():
                typer.echo(f"Models that stores keep: {directory.stores}")
            typer.echo(f"Rounds: fedshelf runs show {directory.path}")
        else:
            typer.echo("Stopped. The same command goes on where this one ended.", err=True)
    if status is not RunStatus.FINISHED:
        sys.exit(1)


def describe_demo(folder: Path, run_dir: Path) -> None:
    """What the demo's run came to, and what to try next."""
    from fedshelf.tracking.queries import run_summary

    rounds = run_summary(run_dir).rounds
    accuracy = rounds[-1].central_accuracy if rounds else None
    photo = next((folder / "photos" / "test").glob("*/*.jpg"), None)
    if accuracy is not None:
        typer.echo(f"\nOne model for five stores names {accuracy:.1%} of photos that no store has seen.")
    typer.echo("\nTry next:")
    typer.echo(f"  fedshelf runs show {run_dir}")
    if photo is not None:
        typer.echo(f"  fedshelf predict {photo} --run {run_dir}")
    stores, test = folder / "photos" / "stores", folder / "photos" / "test"
    typer.echo(f"  fedshelf simulate --data-dir {stores} --test-dir {test} --rounds 15 --workers 2 --algorithm fedprox")
    typer.echo("  fedshelf server --rounds 10 --min-clients 5        (then, in each store:)")
    typer.echo("  fedshelf client --data-dir PHOTOS --server-address SERVER:8080 --ca ca.pem --name STORE")
