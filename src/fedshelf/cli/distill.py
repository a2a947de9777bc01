"""The `fedshelf distill` command."""

from typing import Annotated

import typer

from fedshelf.cli.display import watching
from fedshelf.cli.options import with_options
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import UsageError
from fedshelf.core.stopping import stop_on_signals


@with_options(RunConfig, "distill", renamed={"model": "student"})
def distill(
    *,
    config: RunConfig,
    as_json: Annotated[bool, typer.Option("--json", help="Print events as JSON, one per line.")] = False,
) -> None:
    """Train a light model that learns from a large one, on this machine.

    It is a simulation whose stores have a teacher; with real stores, give 'fedshelf server' the same --teacher.

    Example: fedshelf distill --teacher runs/large --student resnet10 --data-dir stores --rounds 40
    """
    from fedshelf.cli.run_summary import conclude
    from fedshelf.simulate.engine import simulate as run

    problems = []
    if config.teacher is None and config.mode != "ensemble":
        problems.append(f"--mode {config.mode} needs a teacher: add --teacher RUN")
    if (config.unlabelled_dir is None) != (config.mode != "ensemble"):
        problems.append(
            "--mode ensemble and --unlabelled-dir go together: the stores' models are asked about its photos"
        )
    if problems:
        raise UsageError(*problems)
    with watching(as_json=as_json) as watcher, stop_on_signals() as stop:
        status, directory = run(config, watchers=(watcher,), stop=stop)
    conclude(status, directory, as_json=as_json)
