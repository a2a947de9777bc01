"""`fedshelf`: all commands, and what happens to errors."""

import logging
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from fedshelf import __version__
from fedshelf.cli import client, data, demo, evaluate, predict, runs, server, simulate
from fedshelf.core.child_process import follow_parent
from fedshelf.core.errors import FedShelfError

app = typer.Typer(
    help="One product-recognition model over all stores; photos never leave a store.\n\nStart with: fedshelf demo\n\n"
    "Certificates, decoded photos and client states are kept in the user's data directory, or in $FEDSHELF_HOME.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo.demo)
app.command()(server.server)
app.command()(client.client)
app.command()(simulate.simulate)
app.command()(predict.predict)
app.command()(evaluate.evaluate)
app.add_typer(runs.app, name="runs")
app.add_typer(data.app, name="data")


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fedshelf {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more of what happens.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    handler = RichHandler(console=Console(stderr=True), show_time=verbose, show_path=False, rich_tracebacks=False)
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", handlers=[handler])


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a user's mistake is one line and an exit code, never a traceback."""
    try:
        follow_parent()
        app(args=arguments)
    except FedShelfError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {error}", markup=False, style="red")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
