"""The `fedshelf predict` command."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedshelf.cli.display import echo, print_json
from fedshelf.core.errors import DataError
from fedshelf.core.settings import MAX_INTEGER
from fedshelf.core.text import from_filesystem
from fedshelf.reporting.formatting import percent
from fedshelf.tracking.terminal import make_console, print_line

if TYPE_CHECKING:  # imported inside the commands, so that the command line starts fast
    from fedshelf.app.predictor import Guess

Run = Annotated[
    str | None,
    typer.Option("--run", metavar="RUN", help="A run (folder, id), or a folder with a client's state or a model."),
]
Best = Annotated[bool, typer.Option("--best", help="The best round's model instead of the last's.")]
ModelPath = Annotated[
    Path | None,
    typer.Option("--model-path", metavar="DIR", help="Folder of the module of a model of your own (MODULE:FUNCTION)."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs to read.")]


def predict(
    photos: Annotated[list[Path], typer.Argument(metavar="PHOTO...", help="Photos to name.")],
    run: Run = None,
    top: Annotated[int, typer.Option("--top", min=1, max=MAX_INTEGER, help="How many products to name per photo.")] = 5,
    best: Best = False,
    model_path: ModelPath = None,
    as_json: AsJson = False,
) -> None:
    """Name the products in photos.

    Prints the most likely products of each photo with their probabilities.

    Without --run it is the model that a client on this machine keeps.

    Example: fedshelf predict shelf.jpg --run runs/20261121-083512-a1b2
    """
    from fedshelf.app.predictor import Predictor, model_folder

    predictor = Predictor.load(model_folder(run, best=best), model_path=model_path)
    unusable = 0
    for photo in photos:
        try:
            found = predictor.predict(photo, top=top)
        except DataError as error:
            unusable += 1
            _show_unusable(photo, error, as_json=as_json)
        else:
            _show(photo, found, as_json=as_json)
    if unusable:
        raise typer.Exit(1)


def _show(photo: Path, guesses: "Sequence[Guess]", *, as_json: bool) -> None:
    """Print the products in `photo`, most likely first, as a table or one line of JSON."""
    if as_json:
        predictions = [{"class": guess.label, "probability": guess.probability} for guess in guesses]
        print_json({"photo": from_filesystem(str(photo)), "predictions": predictions})
        return
    echo(str(photo), *(f"{percent(guess.probability):>9}  {guess.label}" for guess in guesses))


def _show_unusable(photo: Path, error: Exception, *, as_json: bool) -> None:
    if as_json:
        print_json({"photo": from_filesystem(str(photo)), "error": str(error)})
    else:
        print_line(make_console(stderr=True), str(error), label="error: ", label_style="bold red")
