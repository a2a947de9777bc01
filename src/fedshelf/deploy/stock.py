"""FedShelf's server and client as the two apps that stock Flower runs (docs/how-to/stock-flower.md).

`flower/pyproject.toml` refers to them. The run's configuration has the keys of a FedShelf TOML file. Flower has no null
value, so an empty string stands for it.
"""

import logging
import threading
from collections.abc import Mapping
from typing import Any

from fedshelf.app.client import from_node_config
from fedshelf.app.run import make_server, open_run
from fedshelf.config import files
from fedshelf.config.schema import RunConfig
from fedshelf.core.messages import Join
from fedshelf.core.ports import Transport
from fedshelf.deploy.client_part import Handler
from fedshelf.deploy.flower_apps import make_client_app, make_server_app
from fedshelf.storage.spool import FileSpool
from fedshelf.tracking.terminal import log_to_stderr


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


def _client(node_config: Mapping[str, Any]) -> tuple[Join, Handler]:
    log_to_stderr(logging.WARNING)
    join, store = from_node_config(node_config)
    return join, store.handle


server = make_server_app(_serve)
client = make_client_app(_client)
