"""The summary that a command prints when a run has ended."""

import shlex
from collections.abc import Iterator
from pathlib import Path

import typer

from fedshelf.cli.display import echo, echo_command, program
from fedshelf.core.events import RunStatus
from fedshelf.reporting.formatting import caveats, percent
from fedshelf.storage.run_directory import RunDirectory


def conclude(status: RunStatus, directory: RunDirectory, *, as_json: bool) -> None:
    """Print a run's result and the next command.

    Args:
        status: the run's status.
        directory: the run's directory.
        as_json: print JSON.
    """
    if not as_json:
        echo(*_accuracies(directory.path))
        if status is RunStatus.FINISHED:
            _name_models(directory)
        else:
            echo("Start the same command again to resume the run.")


def _accuracies(run_dir: Path) -> Iterator[str]:
    """Yield the last and the best accuracy for each kind of photos, and what they do not say."""
    from fedshelf.tracking.queries import run_summary

    summary = run_summary(run_dir)
    rounds = summary.rounds
    for photos, key in (("the stores' validation photos", "accuracy"), ("the test photos", "central_accuracy")):
        values = {round_.round: value for round_ in rounds if (value := getattr(round_, key)) is not None}
        if values:
            last, best = max(values), max(values, key=lambda number: values[number])
            # A head made of the newest photos is the best one, whatever an earlier one scored on others.
            is_newest = key == "accuracy" and summary.best_round == last != best
            highest = "" if is_newest else f", best {percent(values[best])} after round {best}"
            yield f"accuracy on {photos}: {percent(values[last])} after round {last}{highest}"
    yield from caveats(summary.num_classes, summary.num_test, summary.num_test_left_out)


def _name_models(directory: RunDirectory) -> None:
    echo(f"Model: {directory.model}")
    if directory.stores.is_dir():
        echo(f"Models that stores keep: {directory.stores}")
    run = shlex.quote(str(directory.path))
    echo_command(
        f"fedshelf predict PHOTO --run {run}", f"fedshelf evaluate FOLDER --run {run}", f"fedshelf runs show {run}"
    )


PRETRAINED = "--model tf_efficientnet_lite0 --pretrained --algorithm ridge --rounds 1 --image-size 128"


def describe_demo(folder: Path, run_dir: Path) -> None:
    """Print the result of the demo's run and what to try next."""
    from fedshelf.tracking.queries import run_summary

    summary = run_summary(run_dir)
    if summary.status is not RunStatus.FINISHED:
        typer.echo(f"The run was stopped ({summary.reason}). Start the same command again to resume it.")
        return
    rounds = summary.rounds
    accuracy = rounds[-1].central_accuracy if rounds else None
    photo = next((folder / "photos" / "test").glob("*/*.jpg"), None)
    if accuracy is not None:
        typer.echo(f"\nOne model for five stores names {percent(accuracy)} of photos that no store has seen.")
    stores, test = folder / "photos" / "stores", folder / "photos" / "test"
    commands = [
        f"runs show {run_dir}",
        *([] if photo is None else [f"predict {photo} --run {run_dir}"]),
        f"simulate --data-dir {stores} --test-dir {test} --rounds 15 --workers 2 --algorithm fedprox",
        "server --rounds 10 --min-clients 5        (prints the command for each store)",
    ]
    typer.echo("\nTry next:")
    for command in commands:
        typer.echo(f"  {program()} {command}")
    typer.echo("\nWith your own photos, one folder per store, and ImageNet weights:")
    typer.echo(f"  {program()} simulate --data-dir STORES {PRETRAINED}")
