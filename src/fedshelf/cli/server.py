"""The `fedshelf server` command."""

import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedshelf.cli.display import stop_on_signals, watching
from fedshelf.cli.options import with_options
from fedshelf.config.files import of_a_server
from fedshelf.config.schema import RunConfig
from fedshelf.core.text import counted

if TYPE_CHECKING:  # imported inside the commands, so that the command line starts fast
    from fedshelf.deploy.address import Address
    from fedshelf.deploy.tls import ServerTls
    from fedshelf.identity.chain import Chain
    from fedshelf.storage.run_directory import RunDirectory


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
    from fedshelf.config import places
    from fedshelf.deploy.address import parse_address, parse_advertised, reachable_address
    from fedshelf.deploy.flower_server import EmbeddedServer
    from fedshelf.identity.chain import Chain
    from fedshelf.storage.spool import FileSpool
    from fedshelf.tracking.audit import AuditSink

    listen = parse_address(config.address)
    advertised = [parse_advertised(text, listen) for text in config.advertise]
    config = of_a_server(config)
    if config.home is not None:
        places.use_home(config.home)
    hosts = [address.host for address in (listen, *advertised)]
    tls = _tls(config, hosts)
    chain = Chain(places.identity_directory(), is_open=config.admission == "open")
    chain.local_token()  # before anybody can connect
    if chain.is_open:
        typer.echo("WARNING: --admission open: anybody who reaches this server can take part in the run.", err=True)
    with (
        watching(as_json=as_json) as watcher,
        stop_on_signals() as stop,
        open_run(config, watchers=(watcher, AuditSink(chain.audit))) as run,
    ):
        incoming = run.directory.incoming
        with EmbeddedServer(
            host=listen.host,
            port=listen.port,
            tls=tls,
            silence=config.heartbeat_timeout,
            incoming=incoming,
            chain=chain,
            renew=lambda: _tls(config, hosts),
        ) as engine:
            typer.echo(f"Run {run.directory.run_id} in {run.directory.path}, listening on {engine.address}", err=True)
            addresses = advertised or [reachable_address(engine.address)]
            invited = config.min_clients if config.invite is None else config.invite
            is_local = engine.address.is_loopback and not advertised
            _invite(chain, addresses, tls, 0 if is_local or chain.is_open else invited, is_local=is_local)
            served = make_server(
                run, transport=engine.transport(), spool=FileSpool(run.directory.spool), stop=stop,
                start_clients=config.min_clients,
            )  # fmt: skip
            chain.audit.write_action(
                "server started", run=run.directory.run_id, address=str(engine.address), admission=config.admission,
                settings=run.directory.config_digest, norm_bound=str(config.norm_bound),
                confirm_catalogue=config.confirm_catalogue, extend=config.extend,
            )  # fmt: skip
            try:
                status = served.run()
            finally:
                _record_models(chain, run.directory)
    conclude(status, run.directory, as_json=as_json)


def _record_models(chain: "Chain", directory: "RunDirectory") -> None:
    """Record which models the run has published so far."""
    from fedshelf.storage.atomic_files import translating_os_errors
    from fedshelf.storage.model_files import WEIGHTS

    for weights in (directory.model / WEIGHTS, directory.best_model / WEIGHTS):
        if weights.is_file():
            with translating_os_errors("read", weights), weights.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            chain.audit.write("released", run=directory.run_id, file=str(weights), sha256=digest)


def _tls(config: RunConfig, hosts: "list[str]") -> "ServerTls | None":
    """Create, renew or load this server's certificate."""
    from fedshelf.config import places
    from fedshelf.core.errors import UsageError
    from fedshelf.deploy.tls import ensure_server_tls, own_server_tls

    if config.insecure:
        typer.echo("WARNING: --insecure: without TLS anyone on the line can read and change what is sent.", err=True)
        return None
    if config.tls_cert is not None and config.tls_key is not None:
        return own_server_tls(config.tls_cert, config.tls_key)
    if config.tls_cert is not None or config.tls_key is not None:
        raise UsageError("--tls-cert and --tls-key go together: give both")
    return ensure_server_tls(places.tls_directory(), hosts, say=lambda text: typer.echo(f"WARNING: {text}", err=True))


def _invite(chain: "Chain", addresses: "list[Address]", tls: "ServerTls | None", count: int, *, is_local: bool) -> None:
    """Print the command to run in each store, and let clients of this user on this machine in."""
    from fedshelf.deploy.tls import certificate_fingerprint

    authority = certificate_fingerprint(tls.ca) if tls and not tls.is_own else ""
    command = "python client.py" if Path(sys.argv[0]).name == "server.py" else "fedshelf client"
    texts = [str(address) for address in addresses]
    chain.note_server(texts, authority)
    flags = f"--data-dir ./local_data --server-address {texts[0]}{'' if tls else ' --insecure'}"
    lines = []
    if count:
        token = chain.invite(count, authority=authority, addresses=texts)
        lines.append(f"In each of up to {counted(count, 'new store')}, until {token.expires:%Y-%m-%d %H:%M} UTC:")
        lines.append(f"  {command} {flags} --token {token}")
        lines.append("  (enrolled stores, and clients on this machine, need no --token)")
    elif is_local:
        lines.append("In each store, on this machine:")
        lines.append(f"  {command} {flags}")
    elif chain.is_open:
        lines.append(f"In each store{f', with a copy of {tls.ca}' if tls and authority else ''}:")
        lines.append(f"  {command} {flags}{' --ca ca.pem' if authority else ''}")
    else:
        lines.append("Enrolled stores can join. For a new one, make a token: fedshelf enroll add NAME")
    typer.echo("\n".join(lines), err=True)
