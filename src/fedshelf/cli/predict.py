"""The `fedshelf predict` command."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedshelf.cli.display import echo, print_json
from fedshelf.core.errors import DataError, UsageError
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
Sales = Annotated[
    Path | None,
    typer.Option("--sales", metavar="STORE", help="Folder of a store, with its sales.csv, for a model trained with "
                 "--sales: photos are named with what it sold before their day."),
]  # fmt: skip
Day = Annotated[
    datetime | None,
    typer.Option("--date", formats=["%Y-%m-%d"], metavar="DATE", help="With --sales: the day on which the photos were "
                 "taken (default: what photos.csv, the camera, or the file's name says)."),
]  # fmt: skip
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs to read.")]


def predict(
    photos: Annotated[list[Path], typer.Argument(metavar="PHOTO...", help="Photos to name.")],
    run: Run = None,
    top: Annotated[int, typer.Option("--top", min=1, max=MAX_INTEGER, help="How many products to name per photo.")] = 5,
    best: Best = False,
    model_path: ModelPath = None,
    sales: Sales = None,
    day: Day = None,
    as_json: AsJson = False,
) -> None:
    """Name the products in photos.

    Prints the most likely products of each photo with their probabilities. If products lie in folders, such as
    Fruit/Apple, it also prints the most likely folder of each level, with the sum of the probabilities below it.

    Without --run it is the model that a client on this machine keeps.

    Example: fedshelf predict shelf.jpg --run runs/20261121-083512-a1b2
    """
    from fedshelf.app.predictor import Predictor, model_folder

    if day is not None and sales is None:
        raise UsageError("--date has no effect without --sales: add that, or leave it out")
    predictor = Predictor.load(model_folder(run, best=best), model_path=model_path)
    if sales is not None:
        predictor = predictor.with_sales(sales)
    unusable = 0
    for photo in photos:
        try:
            found = predictor.predict_levels(photo, top=top, day=day.date() if day else None)
        except DataError as error:
            unusable += 1
            _show_unusable(photo, error, as_json=as_json)
        else:
            _show(photo, found, products=predictor.tree.paths, as_json=as_json)
    if unusable:
        raise typer.Exit(1)


def _show(photo: Path, levels: "Sequence[Sequence[Guess]]", *, products: Sequence[str], as_json: bool) -> None:
    """Print the products in `photo`, most likely first, and the folders above them, as a table or one line of JSON.

    Args:
        photo: the photo.
        levels: the guesses at each level of the product tree.
        products: the products' paths.
        as_json: print JSON.
    """
    *folders, leaves = levels
    if as_json:
        record = {"photo": from_filesystem(str(photo)), "predictions": _record(leaves)}
        above = [{"depth": depth, "predictions": _record(found)} for depth, found in enumerate(folders, start=1)]
        print_json({**record, "levels": above} if above else record)
        return
    likely = [(guess.label, guess.probability) for guess in leaves]
    likely += [(f"{best.label}{'/' * (best.label not in products)}", best.probability) for best, *_ in folders]
    echo(str(photo), *(f"{percent(probability):>9}  {name}" for name, probability in likely))


def _record(guesses: "Sequence[Guess]") -> list[dict[str, object]]:
    return [{"class": guess.label, "probability": guess.probability} for guess in guesses]


def _show_unusable(photo: Path, error: Exception, *, as_json: bool) -> None:
    if as_json:
        print_json({"photo": from_filesystem(str(photo)), "error": str(error)})
    else:
        print_line(make_console(stderr=True), str(error), label="error: ", label_style="bold red")
