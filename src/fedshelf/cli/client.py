"""`fedshelf client`."""

from typing import TYPE_CHECKING

import typer

from fedshelf.cli.options import with_options
from fedshelf.config.schema import ClientConfig
from fedshelf.core.text import printable

if TYPE_CHECKING:  # the command line must start fast: what is needed is imported inside the commands
    from fedshelf.core.messages import Comparison


@with_options(ClientConfig, "client")
def client(*, config: ClientConfig) -> None:
    """Take part as one store, with the photos of a folder.

    The client trains whenever the server asks, and reconnects by itself. Photos never leave the store.

    Example: fedshelf client --data-dir ./local_data --server-address 192.168.1.100:8080 --ca ca.pem --name lyon
    """
    from fedshelf.app.client import ClientPlace, StoreClient, join_of
    from fedshelf.cli.display import stop_on_signals
    from fedshelf.core.errors import TransportError, UsageError
    from fedshelf.deploy.active_hours import Availability
    from fedshelf.deploy.client_loop import run_client
    from fedshelf.deploy.client_part import EndKind
    from fedshelf.deploy.crash_reporter import CrashReporter
    from fedshelf.scheduling.active_hours import active_hours

    if config.data_dir is None:
        raise UsageError("--data-dir is missing: the folder of the store's photos, with one folder per product")
    hours = active_hours(config.active_hours, config.time_zone)
    place = ClientPlace.of(
        config.data_dir, name=config.name, state_dir=config.state_dir, device=config.device, test_dir=config.test_dir
    )  # fmt: skip

    def say(text: str) -> None:
        typer.echo(printable(f"{place.name}: {text}"), err=True)

    if config.insecure:
        typer.echo("WARNING: --insecure: without TLS anyone on the line can read and change what is sent.", err=True)
    with place.lock(), CrashReporter(place.name) as reporter, stop_on_signals() as stop:
        ended = run_client(
            config.server_address,
            StoreClient(place, on_choice=lambda found, folder: say(f"{_kept(found)}: {folder}")).handle,
            join_of(place),
            ca=config.ca,
            insecure=config.insecure,
            stop=stop,
            on_status=say,
            max_wait=config.max_wait,
            availability=Availability(hours),
            reporter=reporter,
        )
    if ended.kind is EndKind.REFUSED:
        raise TransportError(f"the server does not want this client: {ended.reason}")
    say(ended.reason)


def _kept(comparison: "Comparison") -> str:
    """Which model the store keeps, and by what it was chosen."""
    from fedshelf.reporting.gain_report import figures

    photos = "test photos" if comparison.on_test else "validation photos"
    return f"keeps the {comparison.best.value} model{figures(comparison.accuracies)}, judged on its {photos}"
