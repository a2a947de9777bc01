"""The server as an ordinary Flower app, for stock `flower-superlink` and `flwr run`. Documented Flower API only."""

from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedshelf.core.ports import Transport
from fedshelf.deploy.grid_transport import GridTransport

CLOSE_SECONDS = 20.0  # a stock SuperNode looks for messages every 3 s, and starts a process for each


def make_server_app(run: Callable[[Transport, Mapping[str, Any]], None]) -> ServerApp:
    """The app; `run` gets the transport and the run's configuration (``flwr run --run-config``)."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        transport = GridTransport(grid, close_timeout=CLOSE_SECONDS)
        reason = "the run failed; the server's log says why"
        try:
            run(transport, context.run_config)
            reason = "run finished"
        finally:
            transport.close(reason)

    return app
