"""The `fedshelf edge quantize` command."""

from pathlib import Path
from typing import Annotated

import typer

from fedshelf.cli.display import echo, print_json
from fedshelf.cli.predict import AsJson
from fedshelf.core.text import counted, from_filesystem
from fedshelf.reporting.formatting import percent, size


def quantize(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A model file of fedshelf export.")],
    data_dir: Annotated[
        Path, typer.Option("--data-dir", metavar="DIR", help="The store's photos, one folder per product.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The int8 model file to write: NAME.onnx.")],
    test_dir: Annotated[
        Path | None,
        typer.Option(
            "--test-dir", metavar="DIR",
            help="Labeled photos that certify the result, instead of the store's validation photos.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Shrink a model file to a quarter of its size, in the store.

    The network then computes with 8-bit integers. It is certified on the store's photos and on this processor: it gives
    the same answers with any optimization of the graph, and loses at most one point of accuracy. Otherwise the float32
    model stays, nothing is written, and the exit code is 1.

    Example: fedshelf edge quantize shelf.onnx --data-dir photos --out shelf-int8.onnx
    """
    from fedshelf.edge.making.quantize import quantize as quantize_file

    info, certificate = quantize_file(file, data_dir, out, test_dir=test_dir)
    if as_json:
        record = {"model": from_filesystem(str(out)), "bytes": out.stat().st_size, "digest": info.digest}
        print_json({**record, **certificate.to_record(), "loss": certificate.loss})
        return
    echo(
        f"{out}: {size(out.stat().st_size)}, {percent(certificate.bytes_ratio)} of the float32 file",
        f"certified on {counted(certificate.photos, 'photo')} on {certificate.processor}: the same product with and "
        f"without graph optimizations in {percent(certificate.agreement)}, accuracy "
        f"{percent(certificate.accuracy)} (float32: {percent(certificate.float_accuracy)})",
    )
