"""*wire* on Flower's first interface, `start_server` and `start_client`: one gRPC stream per client, without TLS.

    python -m benchmarks.peers.flower_legacy_wire 10                    # megabytes
    python -m benchmarks.peers.flower_legacy_wire 10 ADDRESS NUMBER     # a client

It is deprecated, and still the lightest way to move a model with Flower.
"""

# mypy: disable-error-code="misc"

import logging
import subprocess
import sys
from typing import Any

import numpy as np
from flwr.client import NumPyClient, start_client
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import ServerConfig, start_server
from flwr.server.strategy import FedAvg
from numpy.typing import NDArray

from benchmarks.processes import free_ports
from benchmarks.wire_limit import NUM_CLIENTS, NUM_ROUNDS, WireRounds, change
from fedshelf.core.process_exit import describe_exit


class Mean(FedAvg):
    """FedAvg that records when rounds begin and end.

    Args:
        rounds: Where they are recorded.
    """

    def __init__(self, rounds: WireRounds) -> None:
        super().__init__(
            fraction_evaluate=0.0, min_fit_clients=NUM_CLIENTS, min_available_clients=NUM_CLIENTS,
            initial_parameters=ndarrays_to_parameters([rounds.first_model()]),
            on_fit_config_fn=lambda server_round: {"round": server_round},
        )  # fmt: skip
        self.rounds, self.last = rounds, None

    def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> Any:
        """Wait for all clients, and record when the first round begins."""
        client_manager.wait_for(NUM_CLIENTS)
        if server_round == 1:
            self.rounds.begin()
        return super().configure_fit(server_round, parameters, client_manager)

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        """Average, and record when the round ends."""
        if len(results) != NUM_CLIENTS:
            raise ValueError(f"round {server_round}: {len(results)} of {NUM_CLIENTS} clients answered: {failures}")
        self.last, metrics = super().aggregate_fit(server_round, results, failures)
        self.rounds.end_round()
        return self.last, metrics


class AddingClient(NumPyClient):
    """Returns the changed model.

    Args:
        number: The client's number.
    """

    def __init__(self, number: int) -> None:
        self.number = number

    def fit(self, parameters: list[NDArray[np.float32]], config: dict[str, Any]) -> Any:
        """Add the round's change to the model."""
        return [parameters[0] + change(self.number, int(config["round"]))], 1, {}


def serve(megabytes: int) -> str:
    """Start the clients, run the rounds, and return the figures as JSON."""
    address = f"127.0.0.1:{free_ports(1)[0]}"
    rounds = WireRounds(megabytes)
    strategy = Mean(rounds)
    command = [sys.executable, "-m", __spec__.name, str(megabytes), address]
    clients = [subprocess.Popen([*command, str(number)]) for number in range(NUM_CLIENTS)]
    start_server(server_address=address, config=ServerConfig(num_rounds=NUM_ROUNDS), strategy=strategy)
    figures = rounds.figures(parameters_to_ndarrays(strategy.last)[0])
    for number, client in enumerate(clients):
        if code := client.wait():
            raise SystemExit(f"{describe_exit(f'client {number}', code)}; see above")
    return figures


if __name__ == "__main__":
    logging.getLogger("flwr").setLevel(logging.ERROR)
    if len(sys.argv) == 2:
        print(serve(int(sys.argv[1])))
    else:
        start_client(server_address=sys.argv[2], client=AddingClient(int(sys.argv[3])).to_client(), insecure=True)
