"""FedShelf's side of *wire*: the deployed transport between processes, without training.

    python -m benchmarks.wire_fedshelf server 100 4 tls           # megabytes of float32, clients, tls or plain
    python -m benchmarks.wire_fedshelf client 100 ADDRESS NUMBER [CA]

The server sends a broadcast, spools the clients' uploads and aggregates them in the order of their names, as in a run.
A client's delta is the change of `wire_limit` plus the first model: no two blocks of it are equal, so an engine that
sends equal blocks only once still has to send all of them. The server prints `wire_limit.Figures` as a line of JSON.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import wire_limit
from benchmarks.wire_limit import NUM_ROUNDS, TIMEOUT_SECONDS, WireRounds
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


def serve(megabytes: int, num_clients: int, *, insecure: bool) -> str:
    """Start the clients, run the rounds, check the result, and return the figures as JSON."""
    rounds = WireRounds(megabytes, num_clients, sample_memory=True)
    params = torch.from_numpy(rounds.first_model())
    with tempfile.TemporaryDirectory() as folder:
        tls = None if insecure else ensure_server_tls(Path(folder) / "tls")
        spool = FileSpool(Path(folder) / "spool")
        with EmbeddedServer(host="127.0.0.1", port=0, tls=tls, incoming=Path(folder) / "incoming") as server:
            command = [sys.executable, "-m", __spec__.name, "client", str(megabytes), str(server.address)]
            ca = [str(tls.ca)] if tls else []
            clients = [subprocess.Popen([*command, str(i), *ca]) for i in range(num_clients)]
            transport = server.transport()
            addresses = _joined(transport, num_clients)
            rounds.begin()
            for number in range(1, NUM_ROUNDS + 1):
                params = _round(params, number, transport, addresses, spool)
                rounds.end_round()
            figures = rounds.figures(params.numpy(), first_models=1 + NUM_ROUNDS)
            transport.close("all rounds are done")
            for client in clients:
                client.wait()
    return figures


def _joined(transport: Transport, num_clients: int) -> dict[str, str]:
    """Wait until all clients have joined; return their names by address."""
    names: dict[str, str] = {}
    while len(names) < num_clients:
        arrival = transport.receive(TIMEOUT_SECONDS)
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
        arrival = transport.receive(TIMEOUT_SECONDS)
        if not isinstance(arrival, Reply) or not isinstance(arrival.message, Upload):
            raise SystemExit(f"wire, round {round}: expected an upload, got {arrival}")
        spool.put(key, names[arrival.address], arrival.message, arrival.source)
    uploads = [message for name in spool.names(key) if isinstance(message := spool.get(key, name), Upload)]
    new_params = params + fold([upload.delta for upload in uploads], [1.0] * len(uploads), weighted_mean)
    spool.clear()
    return new_params


def take_part(megabytes: int, address: str, client: int, ca: Path | None) -> None:
    """Run a client: answer every broadcast with the changed model."""
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
    join = Join(protocol=PROTOCOL_VERSION, version=__version__, client=name, classes=())
    run_client(address, answer, join, ca=ca, insecure=ca is None, max_wait=TIMEOUT_SECONDS)


if __name__ == "__main__":
    role, size, *arguments = sys.argv[1:]
    if role == "server":
        number, security = arguments
        print(serve(int(size), int(number), insecure=security == "plain"))
    else:
        server_address, number, *authority = arguments
        take_part(int(size), server_address, int(number), Path(authority[0]) if authority else None)
