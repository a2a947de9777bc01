"""The `fedshelf simulate` command."""

from typing import Annotated

import typer

from fedshelf.cli.display import watching
from fedshelf.cli.options import with_options
from fedshelf.config.schema import RunConfig
from fedshelf.core.stopping import stop_on_signals


@with_options(RunConfig, "simulate")
def simulate(
    *,
    config: RunConfig,
    as_json: Annotated[bool, typer.Option("--json", help="Print events as JSON, one per line.")] = False,
) -> None:
    """Run a whole federation on this machine.

    It runs the code of a deployed federation and gives the same results.

    Example: fedshelf simulate --data-dir stores --test-dir photos/test --rounds 10 --workers 2
    """
    from fedshelf.cli.run_summary import conclude
    from fedshelf.simulate.engine import simulate as run

    with watching(as_json=as_json) as watcher, stop_on_signals() as stop:
        status, directory = run(config, watchers=(watcher,), stop=stop)
    conclude(status, directory, as_json=as_json)
