"""The `fedshelf client` command."""

import shlex
from functools import partial

import typer

from fedshelf.cli.display import program
from fedshelf.cli.options import with_options
from fedshelf.config.schema import ClientConfig


@with_options(ClientConfig, "client")
def client(*, config: ClientConfig) -> None:
    """Take part as one store, with a folder of photos.

    The client trains whenever the server asks, and reconnects by itself. Photos never leave the store.

    Example: fedshelf client --data-dir ./local_data --server-address 192.168.1.100:8080 --token fedshelf1.eyJh…
    """
    from fedshelf.api.client import run_store

    show = partial(typer.echo, err=True)
    folder = run_store(config, show=show)
    if folder is not None:
        show(f"  {program()} predict PHOTO --run {shlex.quote(str(folder))}")
