"""The `fedshelf predict` command."""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedshelf.cli.display import echo, print_json
from fedshelf.core.errors import DataError, UsageError
from fedshelf.core.settings import MAX_INTEGER
from fedshelf.core.text import counted, from_filesystem, printable, spreadsheet_cell
from fedshelf.reporting.formatting import percent
from fedshelf.storage.atomic_files import write_atomically
from fedshelf.tracking.terminal import make_console, print_line

if TYPE_CHECKING:  # imported inside the commands, so that the command line starts fast
    from fedshelf.core.guess import Guess

_CSV_HEADING: tuple[object, ...] = ("photo", "rank", "product", "probability", "sure", "error")

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
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Photos to name, or folders of photos.")],
    run: Run = None,
    onnx: Annotated[
        Path | None, typer.Option("--onnx", metavar="FILE", help="A model file (fedshelf export), instead of --run.")
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, max=MAX_INTEGER, help="How many products to name per photo.")] = 5,
    csv_file: Annotated[
        Path | None,
        typer.Option("--csv", metavar="FILE", help="Write a table, one line per photo and product."),
    ] = None,
    best: Best = False,
    model_path: ModelPath = None,
    sales: Sales = None,
    day: Day = None,
    as_json: AsJson = False,
) -> None:
    """Name the products in photos.

    Prints the most likely products of each photo with their probabilities. If products lie in folders, such as
    Fruit/Apple, it also prints the most likely folder of each level, with the sum of the probabilities below it.

    Without --run or --onnx, it uses the model that a client on this machine keeps. --onnx needs no torch, and says
    whether an answer is sure.

    Example: fedshelf predict shelf.jpg photos/ --run runs/20261121-083512-a1b2 --csv products.csv
    """
    if onnx is not None and (run is not None or best or model_path is not None or sales is not None):
        raise UsageError("--onnx names a whole model: leave out --run, --best, --model-path and --sales")
    if day is not None and sales is None:
        raise UsageError("--date has no effect without --sales: add that, or leave it out")
    if onnx is None:
        named = _predictor(run, best=best, model_path=model_path, sales=sales, day=day.date() if day else None)
    else:
        named = _session(onnx)
    unusable, table = 0, [_CSV_HEADING]
    for photo in _photos(paths):
        name = from_filesystem(str(photo))
        try:
            found = named(photo, top)
        except DataError as error:
            unusable += 1
            table.append((spreadsheet_cell(name), "", "", "", "", spreadsheet_cell(str(error))))
            _show_unusable(photo, error, as_json=as_json)
            continue
        sure = "" if found.is_sure is None else "yes" if found.is_sure else "no"
        table += [
            (spreadsheet_cell(name), rank, spreadsheet_cell(guess.label), guess.probability, sure, "")
            for rank, guess in enumerate(found.levels[-1], start=1)
        ]
        if csv_file is None or as_json:
            _show(photo, found, as_json=as_json)
    if csv_file is not None:
        _write(csv_file, table)
    if unusable:
        raise typer.Exit(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """What a model finds in a photo.

    Attributes:
        levels: the guesses at each level of the product tree, the products last.
        products: the paths of all products.
        is_sure: whether the answer is sure; None of a model without a threshold.
    """

    levels: "Sequence[Sequence[Guess]]"
    products: Sequence[str]
    is_sure: bool | None = None


_Namer = Callable[[Path, int], _Found]


def _predictor(
    run: str | None, *, best: bool, model_path: Path | None, sales: Path | None, day: date | None
) -> _Namer:  # fmt: skip
    from fedshelf.app.predictor import Predictor, model_folder

    predictor = Predictor.load(model_folder(run, best=best), model_path=model_path)
    if sales is not None:
        predictor = predictor.with_sales(sales)
    return lambda photo, top: _Found(
        levels=predictor.predict_levels(photo, top=top, day=day), products=predictor.tree.paths
    )  # fmt: skip


def _session(file: Path) -> _Namer:
    from fedshelf.data.dataset import load_photo
    from fedshelf.edge.serving.session import Session

    session = Session.open(file)

    def name(photo: Path, top: int) -> _Found:
        probabilities_K = session.predict(load_photo(photo, session.info.image_size))
        levels = (*session.top_folders(probabilities_K, top), session.top(probabilities_K, top))
        return _Found(levels=levels, products=session.info.paths, is_sure=session.is_sure(probabilities_K))

    return name


def _photos(paths: Sequence[Path]) -> Iterator[Path]:
    """Yield the files, and the photos below the folders."""
    from fedshelf.data.photo_files import photos_below

    for path in paths:
        if not path.is_dir():
            yield path
        elif found := photos_below(path):
            yield from found
        else:
            raise DataError(f"folder '{path}': no file below it has the name of a photo")


def _show(photo: Path, found: _Found, *, as_json: bool) -> None:
    """Print the products in `photo`, most likely first, and the folders above them, as a table or one line of JSON."""
    *folders, leaves = found.levels
    if as_json:
        record = {"photo": from_filesystem(str(photo)), "predictions": _record(leaves)}
        above = [{"depth": depth, "predictions": _record(level)} for depth, level in enumerate(folders, start=1)]
        sure = {} if found.is_sure is None else {"sure": found.is_sure}
        print_json({**record, **sure, **({"levels": above} if above else {})})
        return
    likely = [(guess.label, guess.probability) for guess in leaves]
    likely += [(f"{best.label}{'/' * (best.label not in found.products)}", best.probability) for best, *_ in folders]
    unsure = " (not sure)" if found.is_sure is False else ""
    echo(f"{photo}{unsure}", *(f"{percent(probability):>9}  {name}" for name, probability in likely))


def _record(guesses: "Sequence[Guess]") -> list[dict[str, object]]:
    """The guesses as JSON. `class` is the former name of `product`."""
    return [{"product": one.label, "class": one.label, "probability": one.probability} for one in guesses]


def _write(file: Path, table: Sequence[Sequence[object]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table)
    write_atomically(file, text.getvalue())
    typer.echo(f"{printable(str(file))}: {counted(len(table) - 1, 'line')}", err=True)


def _show_unusable(photo: Path, error: Exception, *, as_json: bool) -> None:
    if as_json:
        print_json({"photo": from_filesystem(str(photo)), "error": str(error)})
    else:
        print_line(make_console(stderr=True), str(error), label="error: ", label_style="bold red")
