"""FedShelf's server and client as two apps for stock Flower (docs/how-to/stock-flower.md). Documented API only.

`flower/pyproject.toml` refers to them. The run's configuration has the keys of a FedShelf TOML file. Flower has no null
value, so an empty string stands for it.

A stock SuperNode runs each message in a new process, so the client is rebuilt for each message from the node's
configuration (``flower-supernode --node-config 'data-dir="…" name="…" state-dir="…"'``).
"""

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedshelf.app.client import from_node_config
from fedshelf.app.run import open_run
from fedshelf.app.server import make_server
from fedshelf.config import files
from fedshelf.config.schema import RunConfig
from fedshelf.core.errors import RunError
from fedshelf.core.messages import Failure, Join
from fedshelf.core.ports import Transport
from fedshelf.deploy.client_part import ClientPart, Handler, failure_text
from fedshelf.deploy.grid_transport import GridTransport
from fedshelf.deploy.records import Control, WireMessage, to_parcel
from fedshelf.privacy.ledger import Ledger
from fedshelf.storage.hash_chain import DamagedLogError
from fedshelf.storage.spool import FileSpool
from fedshelf.tracking.terminal import log_to_stderr

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 20.0  # a stock SuperNode polls every 3 s and starts a process per message

MakeHandler: TypeAlias = Callable[[Mapping[str, Any]], tuple[Join, Handler, Ledger | None]]


def make_client_app(make_handler: MakeHandler) -> ClientApp:
    """Create the client app.

    Args:
        make_handler: builds a client and its ledger from the node's configuration; called for each message.

    Returns:
        The app.
    """
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        reply: WireMessage
        ledger = None
        try:
            join, handle, ledger = make_handler(context.node_config)
        except DamagedLogError as error:
            raise _unrecorded(error) from None
        except Exception as error:
            logger.exception("the client could not be built from its node configuration")
            reply = Failure(reason=failure_text(error))
        else:
            reply, _ = ClientPart(join=join, handle=handle).answer(message)
        parcel = to_parcel(reply)
        if ledger is not None and not isinstance(reply, Control):
            try:  # the SuperNode does not tell when it has sent a message
                ledger.confirm(ledger.intend(reply, parcel.payload(), blob=parcel.blob_digest))
            except RunError as error:
                raise _unrecorded(error) from None
        return Message(parcel.inline(), reply_to=message)

    for entry in (app.train(), app.evaluate(), app.query()):
        entry(answer)
    return app


def _unrecorded(error: RunError) -> RunError:
    """Flower sends an app's error to the server, which learns of no place on this machine."""
    logger.error("%s", error)
    return RunError("this store's ledger cannot be used, so it sends nothing: the SuperNode's log says why")


def make_server_app(run: Callable[[Transport, Mapping[str, Any]], None]) -> ServerApp:
    """Create the server app.

    Args:
        run: receives the transport and the run's configuration (``flwr run --run-config``).

    Returns:
        The app.
    """
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]  # mypy does not follow imports into Flower
    def main(grid: Grid, context: Context) -> None:
        transport = GridTransport(grid, close_timeout=CLOSE_SECONDS)
        reason = "the run failed; the server's log says why"
        try:
            run(transport, context.run_config)
            reason = "run finished"
        finally:
            transport.close(reason)

    return app


def run_config(values: Mapping[str, Any]) -> RunConfig:
    """Parse the run configuration passed by Flower.

    Args:
        values: the configuration's keys and values.

    Returns:
        The configuration.

    Raises:
        UsageError: see `config.files.parse` and `of_a_server`.
    """
    said = {key: value for key, value in values.items() if value != ""}
    return files.of_a_server(files.parse(RunConfig, said, where="the app's run configuration"))


def _serve(transport: Transport, values: Mapping[str, Any]) -> None:
    """Run to the end; a restart with the same configuration resumes."""
    log_to_stderr(logging.WARNING)
    config = run_config(values)
    with open_run(config, watchers=()) as run:
        make_server(
            run, transport=transport, spool=FileSpool(run.directory.spool), stop=threading.Event(),
            start_clients=config.min_clients,
        ).run()  # fmt: skip


def _client(node_config: Mapping[str, Any]) -> tuple[Join, Handler, Ledger | None]:
    log_to_stderr(logging.WARNING)
    join, store = from_node_config(node_config)
    return join, store.handle, store.ledger


server = make_server_app(_serve)
client = make_client_app(_client)
