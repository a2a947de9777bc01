"""`fedshelf evaluate`."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedshelf.cli.predict import AsJson, Best, Run

if TYPE_CHECKING:  # the command line must start fast: what is needed is imported inside the commands
    from fedshelf.app.predictor import EvaluationReport


def evaluate(
    photos: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder with one folder of photos per product.")],
    run: Run = None,
    best: Best = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model on labelled photos: accuracy and loss, over all and product by product.

    Without --run it is the model that a client on this machine keeps.

    Example: fedshelf evaluate photos/test --run runs/20261121-083512-a1b2
    """
    from fedshelf.app.predictor import Predictor, model_folder
    from fedshelf.reporting.formatting import percent

    folder = model_folder(run, best=best)
    found = Predictor.load(folder).evaluate(photos)
    if as_json:
        summary = {"model": str(folder), "photos": str(photos), "num_photos": found.num_photos}
        figures = {"accuracy": found.accuracy, "loss": found.loss}
        products = [
            {**dataclasses.asdict(product), "accuracy": product.num_correct / product.num_photos}
            for product in found.products
        ]
        rest = {"left_out": dict(found.left_out), "num_unusable": found.num_unusable}
        typer.echo(json.dumps({**summary, **figures, "products": products, **rest}, ensure_ascii=False))
        return
    _print_products(found)
    accuracy = percent(found.accuracy)
    typer.echo(f"accuracy {accuracy}, loss {found.loss:.3f} on {found.num_photos} photos, by the model in {folder}")
    for path, count in found.left_out.items():
        typer.echo(f"left out: {count} photos in '{path}', a product that the model does not know", err=True)
    if found.num_unusable:
        typer.echo(f"left out: {found.num_unusable} photos that cannot be decoded", err=True)


def _print_products(found: "EvaluationReport") -> None:
    from rich.console import Console
    from rich.table import Table

    from fedshelf.reporting.formatting import percent, printable

    table = Table(box=None)
    table.add_column("product", overflow="fold")
    for name in ("photos", "right", "accuracy"):
        table.add_column(name, justify="right")
    table.add_column("most often taken for", overflow="fold")
    for product in found.products:
        accuracy = percent(product.num_correct / product.num_photos)
        names = printable(product.label), printable(product.mistaken_for)
        table.add_row(names[0], str(product.num_photos), str(product.num_correct), accuracy, names[1])
    Console(markup=False).print(table, markup=False)
