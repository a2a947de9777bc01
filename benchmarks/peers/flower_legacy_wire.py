"""*wire* on Flower's first interface, `start_server` and `start_client`: one gRPC stream per client, without TLS.

    python -m benchmarks.peers.flower_legacy_wire 10     # megabytes

Deprecated, and still the lightest way to move a model with Flower.
"""

# mypy: disable-error-code="misc"

import argparse
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

from benchmarks.peers.processes import free_ports
from benchmarks.peers.wire_rounds import WireRounds
from benchmarks.wire_limit import NUM_CLIENTS, NUM_ROUNDS, change


class Mean(FedAvg):
    """FedAvg that notes when rounds begin and end."""

    def __init__(self, rounds: WireRounds) -> None:
        super().__init__(
            fraction_evaluate=0.0, min_fit_clients=NUM_CLIENTS, min_available_clients=NUM_CLIENTS,
            initial_parameters=ndarrays_to_parameters([rounds.first_model()]),
            on_fit_config_fn=lambda server_round: {"round": server_round},
        )  # fmt: skip
        self.rounds, self.last = rounds, None

    def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> Any:
        client_manager.wait_for(NUM_CLIENTS)
        if server_round == 1:
            self.rounds.begin()
        return super().configure_fit(server_round, parameters, client_manager)

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        if len(results) != NUM_CLIENTS:
            raise ValueError(f"round {server_round}: {len(results)} of {NUM_CLIENTS} clients answered: {failures}")
        self.last, metrics = super().aggregate_fit(server_round, results, failures)
        self.rounds.end_round()
        return self.last, metrics


class Adding(NumPyClient):
    def __init__(self, number: int) -> None:
        self.number = number

    def fit(self, parameters: list[NDArray[np.float32]], config: dict[str, Any]) -> Any:
        return [parameters[0] + change(self.number, int(config["round"]))], 1, {}


def serve(megabytes: int) -> str:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    rounds = WireRounds(megabytes)
    strategy = Mean(rounds)
    command = [sys.executable, "-m", __spec__.name, str(megabytes), "--address", address]
    clients = [subprocess.Popen([*command, "--client", str(number)]) for number in range(NUM_CLIENTS)]
    start_server(server_address=address, config=ServerConfig(num_rounds=NUM_ROUNDS), strategy=strategy)
    figures = rounds.figures(parameters_to_ndarrays(strategy.last)[0])
    for client in clients:
        client.wait()
    return figures


def main() -> None:
    logging.getLogger("flwr").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description="Move a model over Flower's first interface.")
    parser.add_argument("megabytes", type=int)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--client", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.client is None:
        print(serve(arguments.megabytes))
    else:
        start_client(server_address=arguments.address, client=Adding(arguments.client).to_client(), insecure=True)


if __name__ == "__main__":
    main()
