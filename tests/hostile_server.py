"""A server process that follows the protocol and sends what no honest server sends.

``python -m tests.hostile_server ADDRESS MESSAGE…``

It takes one client at a time and sends it the next MESSAGE each time that it has an answer to the one before, also
over the client's restarts, and prints each answer as an event. A message is a name of `SETUPS`, `TASKS` or `BROKEN`, or
a task PURPOSE:ROUND:ATTEMPT:MODEL[:STEPS], where MODEL is a number that all of the model's values are shifted by. After
`restart`, the next message waits for another process of the client.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from flwr.app import Error, Message, RecordDict

from fedshelf.app.model import bound_model_of
from fedshelf.config import files
from fedshelf.config.schema import RunConfig
from fedshelf.core.encoded import Encoded
from fedshelf.core.messages import (
    PARAMS,
    STATISTICS,
    TRAINABLE,
    Broadcast,
    ClientMessage,
    Join,
    ModelDelta,
    Purpose,
    ServerMessage,
    Setup,
    TaskKey,
)
from fedshelf.core.ports import Joined, Left, Reply
from fedshelf.data.catalogue import Catalogue
from fedshelf.deploy.address import parse_address
from fedshelf.deploy.flower_server import EmbeddedServer
from fedshelf.personalization.model_selection import FIRST_MODEL

RUN = "attack"
HONEST = RunConfig(
    width=8, norm="group", image_size=16, local_epochs=1, batch_size=8, threads=1, warmup_rounds=0, compile="off"
)  # fmt: skip

SETUPS: Mapping[str, Callable[[Setup], Setup]] = {
    "honest": lambda setup: setup,
    "one-photo-a-step": lambda setup: _with(setup, batch_size=1),
    "one-photo-to-validate": lambda setup: replace(_with(setup, val_fraction=0.99), run_id="another run"),
    "one-class-of-one-photo": lambda setup: replace(
        setup, catalogue=Catalogue(names=("rare",), members=(("rare",),)).to_json()
    ),
    "vit-huge": lambda setup: _with(setup, model="vit_huge_patch14_224"),
    "convnext-xxlarge": lambda setup: _with(setup, model="convnext_xxlarge", image_size=32),
    "wide": lambda setup: _with(setup, width=1024),
    "large-photos": lambda setup: _with(setup, image_size=2048),
    "many-threads": lambda setup: _with(setup, threads=200),
    "many-epochs": lambda setup: _with(setup, local_epochs=1_000_000),
    "much-memory": lambda setup: _with(setup, image_size=192, width=16, batch_size=64),
    "pretrained": lambda setup: replace(setup, config=setup.config + "pretrained = true\n"),
    "init": lambda setup: replace(setup, config=setup.config + 'init = "/etc/passwd"\n'),
    "paths": lambda setup: replace(setup, config=setup.config + 'data-dir = "/"\nrun-dir = "/tmp"\n'),
    "nested": lambda setup: replace(setup, config="a = " + "[" * 60_000),
    "long": lambda setup: replace(setup, config="#" * 10_000_000),
    "long-id": lambda setup: replace(setup, run_id="r" * 300),
    "bad-catalogue": lambda setup: replace(setup, catalogue="[" * 100_000),
}


def _with(setup: Setup, **values: object) -> Setup:
    return replace(setup, config=files.for_clients(HONEST.model_copy(update=values)))


def _coded(codec: str, size: int, **parts: torch.Tensor) -> Broadcast:
    """A model that is encoded in a few bytes and claims `size` values."""
    tiny = Encoded(codec="none", size=0, parts={"values": torch.zeros(0)})
    return Broadcast(
        key=TaskKey(run_id=RUN, round=1, attempt=0), purpose=Purpose.TRAIN, client_lr=0.1, model="x",
        deltas=(ModelDelta(base="", model="x"),),
        vectors={f"0/{TRAINABLE}": Encoded(codec=codec, size=size, parts=parts), f"0/{STATISTICS}": tiny},
    )  # fmt: skip


def _plain(num_values: int, **fields: object) -> Broadcast:
    task = Broadcast(
        key=TaskKey(run_id=RUN, round=1, attempt=0), purpose=Purpose.TRAIN, client_lr=0.1,
        vectors={PARAMS: torch.zeros(num_values)},
    )  # fmt: skip
    return replace(task, **fields)  # type: ignore[arg-type]


TASKS: Mapping[str, Callable[[int], Broadcast]] = {
    "sparse-bomb": lambda size: _coded("topk:1e-09+int8", 2**31 - 1, indices=torch.zeros(9, dtype=torch.uint8)),
    "zstd-bomb": lambda size: _coded("none+zstd", 800_000_000, **{"values.zst": torch.zeros(9, dtype=torch.uint8)}),
    "huge-model": lambda size: _plain(60_000_000),
    "short-model": lambda size: _plain(size - 1),
    "nan-rate": lambda size: _plain(size, client_lr=float("nan")),
    "negative-round": lambda size: _plain(size, key=TaskKey(run_id=RUN, round=-1, attempt=0)),
    "endless-steps": lambda size: _plain(size, num_steps=2**62),
    "other-run": lambda size: _plain(size, key=TaskKey(run_id="../../x", round=1, attempt=0)),
    "no-first-model": lambda size: _plain(size, purpose=Purpose.COMPARE),
    "odd-vector": lambda size: replace(_plain(size), vectors={PARAMS: torch.zeros(size), "auxiliary.x": torch.ones(3)}),
}


def _broken(message: Message, **fields: object) -> Message:
    message.__dict__.update(fields)
    return message


BROKEN: Mapping[str, Callable[[int], Message]] = {
    "no-content": lambda node: _broken(
        Message(RecordDict(), node, "query"), _content=None, _error=Error(code=1, reason="x")
    ),
}
"""Flower messages for a node that are none of ours, and get no answer: the next waits until the client joins again."""


class HostileServer:
    """Makes the messages for one client."""

    def __init__(self, join: Join) -> None:
        catalogue = Catalogue.resolve({join.client: join.classes})
        self._params = bound_model_of(HONEST, catalogue, device="cpu").params
        self._setup = Setup(
            run_id=RUN, config=files.for_clients(HONEST), catalogue=catalogue.to_json(),
            layout_digest=self._params.layout.digest,
        )  # fmt: skip

    def message(self, order: str) -> ServerMessage:
        if order in SETUPS:
            return SETUPS[order](self._setup)
        shared = self._params.shared.detach()
        if order in TASKS:
            return TASKS[order](len(shared))
        purpose, round_, attempt, model, *steps = order.split(":")
        vectors = {PARAMS: shared + float(model)}
        if purpose == "compare":
            vectors[f"auxiliary.{FIRST_MODEL}"] = shared
        return Broadcast(
            key=TaskKey(run_id=RUN, round=int(round_), attempt=int(attempt)), purpose=Purpose(purpose), client_lr=0.05,
            vectors={**vectors}, num_steps=int(steps[0]) if steps else None,
        )  # fmt: skip


def told(order: str, answer: ClientMessage | None, reason: str) -> str:
    """An answer as an event."""
    fields = {"order": order, "answer": type(answer).__name__, "reason": getattr(answer, "reason", reason)}
    return json.dumps({"event": "answer", **fields, "refused": getattr(answer, "refused", None)})


def main(address: str, orders: Sequence[str]) -> None:
    place = parse_address(address)
    left, server, current = list(orders), None, ""
    with EmbeddedServer(host=place.host, port=place.port, tls=None) as embedded:
        transport = embedded.transport()
        print(json.dumps({"event": "listening"}), flush=True)
        while True:
            match transport.receive(1.0):
                case Joined(join=join, address=client):
                    print(json.dumps({"event": "joined", "client": join.client}), flush=True)
                    server = HostileServer(join)
                    if left and left[0] in BROKEN:
                        (connection,) = transport._connections.values()
                        transport._push(connection, BROKEN[left.pop(0)](connection.node_id))
                    elif left:
                        transport.send(client, server.message(left[0]))
                case Reply(address=client, message=answer, reason=reason) if left and server:
                    current = left.pop(0)
                    print(told(current, answer, reason), flush=True)
                    if left and left[0] == "restart":  # the next message waits for the client's next process
                        left.pop(0)
                    elif left:
                        transport.send(client, server.message(left[0]))
                case Left():
                    print(json.dumps({"event": "left"}), flush=True)
            if not left:
                print(json.dumps({"event": "done"}), flush=True)
                left = []


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2:])
