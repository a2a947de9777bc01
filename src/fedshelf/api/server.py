"""Running a server from Python: `fedshelf server`, as a function."""

import hashlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fedshelf.algorithms.base import Algorithm
from fedshelf.api.progress import shown_progress
from fedshelf.api.result import Result
from fedshelf.api.settings import config_of
from fedshelf.app.run import open_run, with_own_model
from fedshelf.app.server import make_server
from fedshelf.config import places
from fedshelf.config.files import of_a_server
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import UsageError
from fedshelf.core.events import RunStatus
from fedshelf.core.ports import MetricSink
from fedshelf.core.stopping import stop_on_signals
from fedshelf.core.text import counted
from fedshelf.deploy.address import Address, parse_address, parse_advertised, reachable_address
from fedshelf.deploy.flower_server import EmbeddedServer
from fedshelf.deploy.tls import ServerTls, certificate_fingerprint, ensure_server_tls, own_server_tls
from fedshelf.identity.chain import Chain
from fedshelf.storage.atomic_files import translating_os_errors
from fedshelf.storage.model_files import WEIGHTS
from fedshelf.storage.run_directory import RunDirectory
from fedshelf.storage.spool import FileSpool
from fedshelf.tracking.audit import AuditSink

Say = Callable[[str], None]


def serve(
    *, algorithm: str | Algorithm | None = None, config: Path | str | None = None, progress: bool = True,
    **settings: Any,
) -> Result:  # fmt: skip
    """Wait for stores and train over them, as `fedshelf server` does; return when the run has ended.

    Ctrl-C stops after the current step. After that or a crash, the same call resumes the run.

    Args:
        algorithm: a name, or an instance of a class of `fedshelf.algorithms`.
        config: a TOML file with settings; keyword arguments win.
        progress: show progress, and how stores join. Warnings are always shown.
        **settings: any flag of `fedshelf server`, such as `min_clients=5`. `home` holds for the whole process.

    Returns:
        History, model, and results of the stores.

    Raises:
        FedShelfError: a setting is invalid, the address cannot be used, or the run failed.
    """
    found = config_of(RunConfig, "server", settings, file=config, algorithm=algorithm)
    with shown_progress(progress=progress) as watchers:
        _, directory = run_server(found, watchers=watchers, say=partial(print, file=sys.stderr, flush=True))
        return Result.of(directory, with_own_model(found))


def run_server(
    config: RunConfig, *, watchers: tuple[MetricSink, ...], say: Say
) -> tuple[RunStatus, RunDirectory]:  # fmt: skip
    """Run a server until its run has ended or is stopped by a signal.

    Args:
        config: the run's configuration.
        watchers: sinks that show events.
        say: shows one or more lines for the person who runs the server.

    Returns:
        The run's status and its directory.

    Raises:
        FedShelfError: a setting is invalid, the address cannot be used, or the run failed.
    """
    listen = parse_address(config.address)
    advertised = [parse_advertised(text, listen) for text in config.advertise]
    config = of_a_server(config)
    if config.home is not None:
        places.use_home(config.home)
    hosts = [address.host for address in (listen, *advertised)]
    tls = _tls(config, hosts, say)
    chain = Chain(places.identity_directory(), is_open=config.admission == "open")
    chain.local_token()  # before anybody can connect
    if chain.is_open:
        say("WARNING: --admission open: anybody who reaches this server can take part in the run.")
    with stop_on_signals() as stop, open_run(config, watchers=(*watchers, AuditSink(chain.audit))) as run:
        incoming = run.directory.incoming
        with EmbeddedServer(
            host=listen.host,
            port=listen.port,
            tls=tls,
            silence=config.heartbeat_timeout,
            incoming=incoming,
            chain=chain,
            renew=lambda: _tls(config, hosts, say),
        ) as engine:
            say(f"Run {run.directory.run_id} in {run.directory.path}, listening on {engine.address}")
            addresses = advertised or [reachable_address(engine.address)]
            invited = config.min_clients if config.invite is None else config.invite
            is_local = engine.address.is_loopback and not advertised
            _invite(say, chain, addresses, tls, 0 if is_local or chain.is_open else invited, is_local=is_local)
            served = make_server(
                run, transport=engine.transport(), spool=FileSpool(run.directory.spool), stop=stop,
                start_clients=config.min_clients, identities=lambda: chain.roster().keys(),
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
    return status, run.directory


def _record_models(chain: Chain, directory: RunDirectory) -> None:
    """Record which models the run has published so far."""
    for weights in (directory.model / WEIGHTS, directory.best_model / WEIGHTS):
        if weights.is_file():
            with translating_os_errors("read", weights), weights.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            chain.audit.write("released", run=directory.run_id, file=str(weights), sha256=digest)


def _tls(config: RunConfig, hosts: list[str], say: Say) -> ServerTls | None:
    """Create, renew or load this server's certificate."""
    if config.insecure:
        say("WARNING: --insecure: without TLS anyone on the line can read and change what is sent.")
        return None
    if config.tls_cert is not None and config.tls_key is not None:
        return own_server_tls(config.tls_cert, config.tls_key)
    if config.tls_cert is not None or config.tls_key is not None:
        raise UsageError("--tls-cert and --tls-key go together: give both")
    return ensure_server_tls(places.tls_directory(), hosts, say=lambda text: say(f"WARNING: {text}"))


def _invite(
    say: Say, chain: Chain, addresses: list[Address], tls: ServerTls | None, count: int, *, is_local: bool
) -> None:
    """Print the command to run in each store, and let clients of this user on this machine in."""
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
    say("\n".join(lines))
