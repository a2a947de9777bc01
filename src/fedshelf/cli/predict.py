"""`fedshelf predict`."""

from pathlib import Path
from typing import Annotated

import typer


def predict(
    photos: Annotated[list[Path], typer.Argument(metavar="PHOTO...", help="Photos to name.")],
    run: Annotated[str, typer.Option("--run", metavar="RUN", help="A run (folder, id) or a folder with a model.")],
    top: Annotated[int, typer.Option("--top", min=1, help="How many products to name per photo.")] = 5,
    best: Annotated[bool, typer.Option("--best", help="The best round's model instead of the last's.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs to read.")] = False,
) -> None:
    """Name the products in photos, with probabilities.

    Example: fedshelf predict shelf.jpg --run runs/20261121-083512-a1b2
    """
    import json

    from rich.console import Console
    from rich.table import Table

    from fedshelf.config.predictor import Predictor, model_folder
    from fedshelf.core.errors import DataError

    predictor = Predictor.load(model_folder(run, best=best))
    unusable = 0
    for photo in photos:
        try:
            found = predictor.predict(photo, top=top)
        except DataError as error:
            unusable += 1
            if as_json:
                typer.echo(json.dumps({"photo": str(photo), "error": str(error)}))
            else:
                typer.echo(f"{photo}: {error}", err=True)
            continue
        if as_json:
            guesses = [{"class": guess.label, "probability": guess.probability} for guess in found]
            typer.echo(json.dumps({"photo": str(photo), "predictions": guesses}, ensure_ascii=False))
            continue
        typer.echo(photo)
        table = Table(show_header=False, box=None)
        for guess in found:
            table.add_row(f"{guess.probability:6.1%}", guess.label)
        Console().print(table)
    if unusable:
        raise typer.Exit(1)
