"""The `fedshelf server` command."""

from functools import partial
from typing import Annotated

import typer

from fedshelf.cli.display import watching
from fedshelf.cli.options import with_options
from fedshelf.config.schema import RunConfig


@with_options(RunConfig, "server")
def server(
    *,
    config: RunConfig,
    as_json: Annotated[bool, typer.Option("--json", help="Print events as JSON, one per line.")] = False,
) -> None:
    """Run the server: wait for stores and train over them.

    After a stop or a crash, the same command resumes the run.

    Example: fedshelf server --rounds 10 --min-clients 5
    """
    from fedshelf.api.server import run_server
    from fedshelf.cli.run_summary import conclude

    with watching(as_json=as_json) as watcher:
        status, directory = run_server(config, watchers=(watcher,), say=partial(typer.echo, err=True))
    conclude(status, directory, as_json=as_json)
