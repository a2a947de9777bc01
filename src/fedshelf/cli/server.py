"""The `fedshelf server` command."""

from typing import TYPE_CHECKING, Annotated

import typer

from fedshelf.cli.display import stop_on_signals, watching
from fedshelf.cli.options import with_options
from fedshelf.config.files import of_a_server
from fedshelf.config.schema import RunConfig

if TYPE_CHECKING:  # imported inside the commands, so that the command line starts fast
    from fedshelf.deploy.address import Address
    from fedshelf.deploy.tls import ServerTls


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
    from fedshelf.cli.run_summary import conclude
    from fedshelf.deploy.address import parse_address, parse_advertised, reachable_address
    from fedshelf.deploy.flower_server import EmbeddedServer
    from fedshelf.storage.spool import FileSpool

    listen = parse_address(config.address)
    advertised = [parse_advertised(text, listen) for text in config.advertise]
    config = of_a_server(config)
    tls = _tls([listen, *advertised], insecure=config.insecure)
    with watching(as_json=as_json) as watcher, stop_on_signals() as stop, open_run(config, watchers=(watcher,)) as run:
        incoming = run.directory.incoming
        with EmbeddedServer(
            host=listen.host, port=listen.port, tls=tls, silence=config.heartbeat_timeout, incoming=incoming
        ) as engine:
            typer.echo(f"Run {run.directory.run_id} in {run.directory.path}, listening on {engine.address}", err=True)
            _invite(advertised[0] if advertised else reachable_address(engine.address), tls)
            served = make_server(
                run, transport=engine.transport(), spool=FileSpool(run.directory.spool), stop=stop,
                start_clients=config.min_clients,
            )  # fmt: skip
            status = served.run()
    conclude(status, run.directory, as_json=as_json)


def _tls(addresses: "list[Address]", *, insecure: bool) -> "ServerTls | None":
    """Create or load this server's certificate."""
    from fedshelf.config import places
    from fedshelf.deploy.tls import ensure_server_tls

    if insecure:
        typer.echo("WARNING: --insecure: without TLS anyone on the line can read and change what is sent.", err=True)
        return None
    hosts = [address.host for address in addresses]
    return ensure_server_tls(places.tls_directory(), hosts, say=lambda text: typer.echo(f"WARNING: {text}", err=True))


def _invite(address: "Address", tls: "ServerTls | None") -> None:
    """Print the command to run in each store."""
    from fedshelf.deploy.tls import fingerprint

    copy, trust = ("", "--insecure") if tls is None else (f", with a copy of {tls.ca}", "--ca ca.pem")
    lines = [
        f"In each store{copy}:",
        f"  fedshelf client --server-address {address} {trust} --name STORE --data-dir PHOTOS",
    ]
    if tls is not None:
        lines.append(f"  (the SHA-256 fingerprint of ca.pem is {fingerprint(tls.ca)})")
    if address.is_loopback:
        lines.append("  (on this machine alone, which needs no --ca: it listens on a loopback address)")
    typer.echo("\n".join(lines), err=True)
