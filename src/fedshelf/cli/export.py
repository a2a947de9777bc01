"""The `fedshelf export` command."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from fedshelf.cli.display import echo, print_json
from fedshelf.cli.predict import AsJson, Best, ModelPath
from fedshelf.core.text import counted, from_filesystem
from fedshelf.reporting.formatting import percent, size


def export(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A run (folder, id), or a folder with a client's state or a model.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The model file to write: NAME.onnx.")],
    format: Annotated[Literal["onnx"], typer.Option("--format", help="Format of the file.")] = "onnx",
    best: Best = False,
    check_photos: Annotated[
        Path | None,
        typer.Option(
            "--check-photos", metavar="DIR",
            help="Photos on which to compare the file with the model (default: generated ones).",
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            "--calibrate", metavar="DIR",
            help="Labeled photos, one folder per product, to calibrate probabilities and the threshold for sure.",
        ),
    ] = None,
    precision: Annotated[
        float, typer.Option("--precision", min=0, max=1, help="Share of sure answers that must be right.")
    ] = 0.95,
    updatable: Annotated[
        bool,
        typer.Option(
            "--updatable",
            help="Let tills learn from corrections at once. Writes NAME.head.safetensors, which tells them sums over "
            "the photos of all stores.",
        ),
    ] = False,
    model_path: ModelPath = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Export a model as one file for the store.

    The file takes the pixels of a photo of any size, and returns the probability of each product. It includes resizing
    and normalization. Before it is written, its answers are compared with the model's. The model card is written next
    to it, as NAME.card.md.

    Example: fedshelf export runs/20261121-083512-a1b2 --out shelf.onnx --calibrate photos/val
    """
    from fedshelf.app.predictor import Predictor, model_folder
    from fedshelf.edge.making.card import card_file_of
    from fedshelf.edge.making.export import export as export_model
    from fedshelf.edge.serving.local_head import head_file_of

    card = card_file_of(out)
    predictor = Predictor.load(model_folder(run, best=best), model_path=model_path)
    info = export_model(
        predictor, out, check=check_photos, calibrate=calibrate, precision=precision, updatable=updatable
    )  # fmt: skip
    num_bytes, parity, foreign = out.stat().st_size, info.card["parity"], info.card["foreign_decoder"]
    if as_json:
        print_json(
            {
                "model": from_filesystem(str(out)), "card": from_filesystem(str(card)), "format": format,
                "head": from_filesystem(str(head_file_of(out))) if updatable else None,
                "bytes": num_bytes, "digest": info.digest, "products": len(info.labels),
                "image_size": info.image_size, "temperature": info.temperature, "threshold": info.threshold,
                "calibration": info.card["calibration"], "parity": parity, "foreign_decoder": foreign,
            }
        )  # fmt: skip
        return
    found = info.card["calibration"]
    sure = "answers are not calibrated: give labeled photos with --calibrate"
    if found:
        share = f"{percent(found['sure'])} of {counted(found['photos'], 'photo')}"
        sure = f"sure from a probability of {info.threshold:.4g} on: {share}"
    echo(
        f"{out}: {size(num_bytes)}, {counted(len(info.labels), 'product')}, digest {info.digest[:12]}",
        f"its model card is {card}",
        *([f"tills learn from corrections at once with {head_file_of(out)} beside it"] if updatable else []),
        f"checked on {parity['photos']}: the largest difference of a probability is {parity['max_difference']:.1e}",
        f"with full-size pixels of another decoder: the same product in {percent(foreign['agreement'])}",
        sure,
    )
