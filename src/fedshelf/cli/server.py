"""`fedshelf server`."""

from typing import Annotated

import typer

from fedshelf.cli.options import with_options
from fedshelf.config.files import of_a_server
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
    from fedshelf.app.run import make_server, open_run
    from fedshelf.cli.display import stop_on_signals, watching
    from fedshelf.cli.run_summary import conclude
    from fedshelf.deploy.address import parse_address
    from fedshelf.deploy.flower_server import EmbeddedServer
    from fedshelf.storage.spool import FileSpool

    listen = parse_address(config.address)
    config = of_a_server(config)
    with watching(as_json=as_json) as watcher, stop_on_signals() as stop, open_run(config, watchers=(watcher,)) as run:
        tls = _tls(config.insecure, listen.host)
        with EmbeddedServer(
            host=listen.host, port=listen.port, tls=tls, silence=config.heartbeat_timeout,
            incoming=run.directory.incoming,
        ) as engine:  # fmt: skip
            typer.echo(f"Run {run.directory.run_id} in {run.directory.path}, listening on {engine.address}", err=True)
            served = make_server(
                run, transport=engine.transport(), spool=FileSpool(run.directory.spool), stop=stop,
                start_clients=config.min_clients,
            )  # fmt: skip
            status = served.run()
    conclude(status, run.directory, as_json=as_json)


def _tls(insecure: bool, host: str) -> "ServerTls | None":  # type: ignore[name-defined]  # noqa: F821
    """Make or find this server's certificate, and say what a client elsewhere needs."""
    from fedshelf.config import places
    from fedshelf.deploy.tls import ensure_server_tls, fingerprint

    if insecure:
        typer.echo("WARNING: --insecure: without TLS anyone on the line can read and change what is sent.", err=True)
        return None
    tls = ensure_server_tls(places.tls_directory(), [host])
    typer.echo(f"TLS: clients on other machines need --ca with a copy of {tls.ca}", err=True)
    typer.echo(f"     whose fingerprint (SHA-256) is {fingerprint(tls.ca)}", err=True)
    return tls
