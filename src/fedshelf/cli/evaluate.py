"""The `fedshelf evaluate` command."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedshelf.cli.display import echo, print_json
from fedshelf.cli.predict import AsJson, Best, ModelPath, Run, Sales
from fedshelf.cli.tables import Column, Table
from fedshelf.core.text import counted, from_filesystem
from fedshelf.reporting.formatting import number, percent

if TYPE_CHECKING:  # imported inside the commands, so that the command line starts fast
    from fedshelf.app.predictor import EvaluationReport


def evaluate(
    photos: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder with one folder of photos per product.")],
    run: Run = None,
    best: Best = False,
    model_path: ModelPath = None,
    sales: Sales = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model on labeled photos.

    Prints accuracy and loss over all photos, and a table by product.

    Without --run it is the model that a client on this machine keeps.

    Example: fedshelf evaluate photos/test --run runs/20261121-083512-a1b2
    """
    from fedshelf.app.predictor import Predictor, model_folder

    folder = model_folder(run, best=best)
    predictor = Predictor.load(folder, model_path=model_path)
    found = (predictor if sales is None else predictor.with_sales(sales)).evaluate(photos)
    if as_json:
        summary = {
            "model": from_filesystem(str(folder)),
            "photos": from_filesystem(str(photos)),
            "num_photos": found.num_photos,
        }
        figures = {"accuracy": found.accuracy, "loss": found.loss}
        products = [
            {**dataclasses.asdict(product), "accuracy": product.num_correct / product.num_photos}
            for product in found.products
        ]
        rest = {"left_out": dict(found.left_out), "num_unusable": found.num_unusable}
        print_json({**summary, **figures, "products": products, **rest})
        return
    measured = f"accuracy {percent(found.accuracy)}, loss {number(found.loss)} on {counted(found.num_photos, 'photo')}"
    echo(_table(found), f"{measured}; the model is in {folder}")


def _table(found: "EvaluationReport") -> Table:
    figures = [Column(name=name, is_figure=True) for name in ("photos", "right", "accuracy")]
    table = Table(columns=[Column(name="product"), *figures, Column(name="most often taken for")])
    for product in found.products:
        accuracy = percent(product.num_correct / product.num_photos)
        table.add(product.label, str(product.num_photos), str(product.num_correct), accuracy, product.mistaken_for)
    return table
