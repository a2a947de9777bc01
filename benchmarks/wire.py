"""FedShelf's side of *wire*: the deployed transport between processes, without training.

    python -m benchmarks.wire 100 [--insecure] [--clients 16]     # megabytes of float32

The server sends a broadcast, spools what the clients upload and folds it in the order of their names, as in a run. A
client's delta is the change of `wire_limit` plus the first model: no two blocks of it are alike, so that an engine that
sends equal blocks once has to send them all. One line of JSON comes out, see `wire_limit.Figures`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import wire_limit
from benchmarks.wire_limit import NUM_CLIENTS, NUM_ROUNDS, AnonymousMemory, Figures
from fedshelf import __version__
from fedshelf.algorithms.aggregation import fold
from fedshelf.algorithms.reduce import weighted_mean
from fedshelf.core.messages import (
    PROTOCOL_VERSION,
    Broadcast,
    ClientMessage,
    Failure,
    Join,
    Purpose,
    ServerMessage,
    TaskKey,
    Upload,
)
from fedshelf.core.ports import Joined, Reply, Spool, Transport
from fedshelf.deploy.client_loop import run_client
from fedshelf.deploy.flower_server import EmbeddedServer
from fedshelf.deploy.tls import ensure_server_tls
from fedshelf.storage.spool import FileSpool

PATIENCE_SECONDS = 120.0


def serve(megabytes: int, num_clients: int, *, insecure: bool) -> Figures:
    """Start the clients, run the rounds, check the result."""
    params = torch.from_numpy(wire_limit.first_model(wire_limit.num_values(megabytes)))
    with tempfile.TemporaryDirectory() as folder:
        tls = None if insecure else ensure_server_tls(Path(folder) / "tls")
        spool = FileSpool(Path(folder) / "spool")
        with EmbeddedServer(host="127.0.0.1", port=0, tls=tls, incoming=Path(folder) / "incoming") as server:
            command = [sys.executable, "-m", __spec__.name, str(megabytes), "--address", str(server.address)]
            command += ["--ca", str(tls.ca)] if tls else ["--insecure"]
            clients = [subprocess.Popen([*command, "--client", str(i)]) for i in range(num_clients)]
            transport = server.transport()
            addresses = _joined(transport, num_clients)
            memory = AnonymousMemory()
            bytes_before, round_seconds = wire_limit.loopback_bytes(), []
            for number in range(1, NUM_ROUNDS + 1):
                started = time.perf_counter()
                params = _round(params, number, transport, addresses, spool)
                round_seconds.append(time.perf_counter() - started)
            result = wire_limit.figures(round_seconds, megabytes, num_clients, bytes_before, memory)
            transport.close("all rounds are done")
            for client in clients:
                client.wait()
    wire_limit.check(params.numpy(), num_clients, first_models=1 + NUM_ROUNDS)
    return result


def _joined(transport: Transport, num_clients: int) -> dict[str, str]:
    """Each client's name by its address, once all are there."""
    names: dict[str, str] = {}
    while len(names) < num_clients:
        arrival = transport.receive(PATIENCE_SECONDS)
        if not isinstance(arrival, Joined):
            raise SystemExit(f"wire: expected a client to join, got {arrival}")
        names[arrival.address] = arrival.join.client
    return names


def _round(params: Tensor, round: int, transport: Transport, names: dict[str, str], spool: Spool) -> Tensor:
    key = TaskKey(run_id="wire", round=round, attempt=0)
    broadcast = Broadcast(key=key, purpose=Purpose.TRAIN, vectors={"params": params}, client_lr=0.1)
    for address in names:
        transport.send(address, broadcast)
    while len(spool.names(key)) < len(names):
        arrival = transport.receive(PATIENCE_SECONDS)
        if not isinstance(arrival, Reply) or not isinstance(arrival.message, Upload):
            raise SystemExit(f"wire, round {round}: expected an upload, got {arrival}")
        spool.put(key, names[arrival.address], arrival.message, arrival.source)
    uploads = [message for name in spool.names(key) if isinstance(message := spool.get(key, name), Upload)]
    new_params = params + fold([upload.delta for upload in uploads], [1.0] * len(uploads), weighted_mean)
    spool.clear()
    return new_params


def take_part(megabytes: int, address: str, client: int, ca: Path | None) -> None:
    """Answer every broadcast with the model changed."""
    pattern = torch.from_numpy(wire_limit.first_model(wire_limit.num_values(megabytes)))

    def answer(message: ServerMessage) -> ClientMessage:
        if not isinstance(message, Broadcast):
            return Failure(reason="this client only moves bytes")
        started = time.perf_counter()
        delta = pattern + wire_limit.change(client, message.key.round)
        return Upload(
            key=message.key, vectors={"delta": delta}, num_examples=1, num_steps=1, train_loss=0.0,
            seconds=time.perf_counter() - started,
        )  # fmt: skip

    name = f"client-{client}"
    join = Join(protocol=PROTOCOL_VERSION, version=__version__, client=name, identity=name, classes=())
    run_client(address, answer, join, ca=ca, insecure=ca is None, max_wait=PATIENCE_SECONDS)


def main() -> None:
    parser = argparse.ArgumentParser(description="Move a model over FedShelf's transport.")
    parser.add_argument("megabytes", type=int)
    parser.add_argument("--insecure", action="store_true", help="no TLS")
    parser.add_argument("--clients", type=wire_limit.power_of_two, default=NUM_CLIENTS, help="client processes")
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--ca", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--client", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.client is None:
        print(json.dumps(asdict(serve(arguments.megabytes, arguments.clients, insecure=arguments.insecure))))
    else:
        take_part(arguments.megabytes, arguments.address, arguments.client, arguments.ca)


if __name__ == "__main__":
    main()
