"""The `fedshelf edge` commands: the model at the shelf, and the staff's corrections. Nothing here imports torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedshelf.cli.commands import Commands
from fedshelf.cli.display import echo, echo_command, print_json
from fedshelf.cli.edge_quantize import quantize
from fedshelf.cli.tables import Column, Table
from fedshelf.core.settings import MAX_INTEGER
from fedshelf.core.text import counted
from fedshelf.edge.serving.serve import DEFAULT_DAILY_CAP, DEFAULT_HOST, DEFAULT_PORT

if TYPE_CHECKING:  # imported inside the commands, so that the command line starts fast
    from fedshelf.app.trained_photos import TrainedPhotos
    from fedshelf.edge.serving.correction_journal import Correction

app = Commands(help="Recognize products in a store, and file the staff's corrections.")
corrections = Commands(help="List, undo, and review corrections.")
app.add_typer(corrections, name="corrections")
app.command("quantize")(quantize)

_DataDir = Annotated[Path, typer.Argument(metavar="DIR", help="The store's photo folder.")]
_Ids = Annotated[list[str], typer.Argument(metavar="ID...", help="Corrections, as 'list' shows them.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs to read.")]


@app.command()
def serve(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model file from 'fedshelf export'.")],
    host: Annotated[str, typer.Option(help="Address to listen on. All but loopback need a token.")] = DEFAULT_HOST,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 chooses a free one.")
    ] = DEFAULT_PORT,
    data_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The store's photo folder. Without it, corrections are not accepted."),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="File with the token (default: $FEDSHELF_EDGE_TOKEN, or a file in $FEDSHELF_HOME)."
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Another host name that browsers use for this server.")
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="TLS certificate (PEM, with its chain).")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Key of the TLS certificate (PEM).")] = None,
    daily_cap: Annotated[
        int, typer.Option(min=0, max=MAX_INTEGER, help="Corrections per day that are used for training without review.")
    ] = DEFAULT_DAILY_CAP,
    threads: Annotated[
        int, typer.Option(min=0, max=1024, help="CPU threads per photo; 0 lets ONNX Runtime choose.")
    ] = 0,
    in_browser: Annotated[
        bool,
        typer.Option("--in-browser", help="Browsers run the model themselves, also with the network cut."),
    ] = False,
) -> None:
    """Serve a model: a page for a phone or a till, and an HTTP API.

    Photos stay on this machine. SIGTERM and Ctrl-C finish the requests that are being answered.

    Example: fedshelf edge serve model.onnx --data-dir photos/
    """
    from fedshelf.edge.serving.serve import Serving
    from fedshelf.edge.serving.serve import serve as serve_model

    serving = Serving(
        model=model, host=host, port=port, data_dir=data_dir, token_file=token_file, allow_host=allow_host or (),
        tls_cert=tls_cert, tls_key=tls_key, daily_cap=daily_cap, threads=threads, in_browser=in_browser,
    )  # fmt: skip
    serve_model(serving, say=echo)


@corrections.command("list")
def list_(data_dir: _DataDir, as_json: _Json = False) -> None:
    """List the corrections, and since which round each is trained on.

    Example: fedshelf edge corrections list photos/
    """
    from fedshelf.app.trained_photos import trained_on
    from fedshelf.config.places import absolute
    from fedshelf.edge.serving.corrections import Corrections, unknown_products

    folder = absolute(data_dir)
    found = Corrections(folder, create=False).all()
    trained = trained_on(folder)
    if as_json:
        print_json([_record(correction, trained) for correction in found])
        return
    table = Table(
        columns=[Column(name=name) for name in ("id", "time", "product", "status", "trained since", "reason")]
    )
    for correction in found:
        since = trained.first_round(correction.photo, correction.path)
        table.add(
            correction.id, correction.time[:16].replace("T", " "), correction.product, correction.status.value,
            f"round {since.round} of {since.run_id}" if since else "", correction.reason,
        )  # fmt: skip
    echo(table)
    for line in trained.receipts((c.photo, c.path) for c in found):
        echo(line)
    for product, number in sorted(unknown_products(found).items()):
        echo(f"{counted(number, 'photo')} of the unknown product '{product}' in the inbox, not trained on")
    if not found:
        echo(f"'{folder}' has no corrections.")


@corrections.command()
def undo(data_dir: _DataDir, ids: _Ids) -> None:
    """Take corrections back.

    Their photos are deleted, and the next round does not train on them.

    Example: fedshelf edge corrections undo photos/ 5f0c2b9d1e7a4c33
    """
    from fedshelf.config.places import absolute
    from fedshelf.edge.serving.corrections import Corrections

    store = Corrections(absolute(data_dir), create=False)
    for name in ids:
        echo(f"Took back {name}, {store.undo(name).product}.")


@corrections.command()
def review(
    data_dir: _DataDir,
    accept: Annotated[list[str] | None, typer.Option(metavar="ID", help="Train on this photo.")] = None,
    reject: Annotated[list[str] | None, typer.Option(metavar="ID", help="Delete this photo.")] = None,
    as_json: _Json = False,
) -> None:
    """Show the photos that wait for a person; accept and reject some.

    Suspicious corrections and unknown products wait. An accepted photo of a new product gets a folder of that name.

    Example: fedshelf edge corrections review photos/ --accept 5f0c2b9d1e7a4c33
    """
    from fedshelf.config.places import absolute
    from fedshelf.edge.serving.correction_journal import WAITING
    from fedshelf.edge.serving.corrections import Corrections

    folder = absolute(data_dir)
    store = Corrections(folder, create=False)
    for name in accept or ():
        echo(f"Accepted {name}: '{store.accept(name).path}'")
    for name in reject or ():
        echo(f"Rejected {name}, {store.reject(name).product}.")
    if accept or reject:
        return
    waiting = [correction for correction in store.all() if correction.status in WAITING]
    if as_json:
        print_json([_record(correction) for correction in waiting])
        return
    table = Table(columns=[Column(name=name) for name in ("id", "product", "photo", "why it waits")])
    for correction in waiting:
        table.add(correction.id, correction.product, correction.path, correction.reason or "the product is unknown")
    echo(table)
    echo(f"{counted(len(waiting), 'correction')} to review in '{folder}'")
    if waiting:
        echo_command(f"fedshelf edge corrections review {data_dir} --accept {waiting[0].id}")


def _record(correction: "Correction", trained: "TrainedPhotos | None" = None) -> dict[str, object]:
    record: dict[str, object] = {
        name: getattr(correction, name)
        for name in ("id", "time", "product", "status", "path", "photo", "reason", "predicted", "probability")
    }
    if trained is not None:
        since = trained.first_round(correction.photo, correction.path)
        record["trained_since"] = {"run": since.run_id, "round": since.round} if since else None
    return record
