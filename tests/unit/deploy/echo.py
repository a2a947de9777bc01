"""Clients that answer with what they were sent, plus one: as threads of a test, or as processes of their own
(``python -m tests.unit.deploy.echo ADDRESS NAME [CA]``). And the server's side of talking to them."""

import contextlib
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import torch
from flwr.app import Message, RecordDict

from fedshelf.core.messages import (
    Broadcast,
    ClientMessage,
    Evaluation,
    Join,
    Purpose,
    Ready,
    ServerMessage,
    Setup,
    TaskKey,
    Upload,
)
from fedshelf.core.ports import Joined
from fedshelf.core.process_exit import CRASHES, signal_of
from fedshelf.deploy.client_loop import run_client
from fedshelf.deploy.client_part import Ended
from fedshelf.deploy.credentials import Credentials
from fedshelf.deploy.flower_client import FleetSession
from fedshelf.deploy.flower_server import EmbeddedServer
from fedshelf.deploy.grid_transport import GridTransport
from fedshelf.deploy.records import Control, WireMessage, open_records, to_parcel
from fedshelf.identity.store_keys import StoreKeys
from fedshelf.serialization.blob import Buffer
from tests.fork_server import environment_of_a_process
from tests.processes import ROOT, Process

PATIENCE = 60.0  # seconds that a test waits for what must come, on a busy machine
FAIL = 1e-9
SETUP = Setup(run_id="r", config="", catalogue="", layout_digest="")
_T = TypeVar("_T")
_processes: list[Process] = []  # of clients
_folder = tempfile.TemporaryDirectory(prefix="fedshelf-keys-")


def join(name: str) -> Join:
    return Join(protocol=1, version="0.1.0", client=name, classes=())


def echo(message: ServerMessage) -> ClientMessage:
    """Answer at once; the learning rate `FAIL` is an order to fail, one above 1 to work that many seconds."""
    if isinstance(message, Setup):
        return Ready(
            run_id=message.run_id, layout_digest="", catalogue_digest="", config_digest="", num_train=1,
            num_validation=1, num_left_out=0,
        )  # fmt: skip
    if not isinstance(message, Broadcast):
        raise TypeError("only plain broadcasts are answered here")
    if message.client_lr == FAIL:
        raise ValueError("cannot read /srv/photos/secret.jpg")
    if message.client_lr > 1:
        time.sleep(message.client_lr)
    if message.purpose is Purpose.EVALUATE:
        return Evaluation(key=message.key, num_examples=2, num_correct=1, loss_sum=0.5)
    return Upload(
        key=message.key, vectors={"delta": message.params + 1}, num_examples=1, num_steps=1, train_loss=0.5, seconds=0.1
    )


def task(params: torch.Tensor, *, round: int = 1, purpose: Purpose = Purpose.TRAIN, lr: float = 0.1) -> Broadcast:
    return Broadcast(
        key=TaskKey(run_id="r", round=round, attempt=1), purpose=purpose, vectors={"params": params}, client_lr=lr
    )


def keys_of(address: object, name: str) -> StoreKeys:
    """The keys of a client, the same as long as this process lives."""
    return StoreKeys(Path(_folder.name) / f"{address}" / name)


def session_of(server: EmbeddedServer, name: str = "mallory") -> FleetSession:
    """A session of the client `name` that has been enrolled, without TLS."""
    credentials = Credentials(server.address, keys_of(server.address, name), name=name, insecure=True)
    return FleetSession(credentials)


class ThreadClient:
    """A client in a thread of this process; `result` is how it ended."""

    def __init__(self, address: object, name: str, **options: Any) -> None:
        self.stop = threading.Event()
        self.result: Future[Ended] = Future()
        self.statuses: list[str] = []
        options.setdefault("insecure", True)
        options.setdefault("keys", keys_of(address, name))

        def work() -> None:
            try:
                self.result.set_result(
                    run_client(
                        str(address), options.pop("handle", echo), join(name), stop=self.stop,
                        on_status=self.statuses.append, **options,
                    )
                )  # fmt: skip
            except BaseException as error:
                self.result.set_exception(error)

        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()

    def says(self, text: str) -> str:
        """The first status that holds `text`, once there is one."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if found := [status for status in self.statuses if text in status]:
                return found[0]
            time.sleep(0.02)
        raise AssertionError(f"no {text!r} in {self.statuses}")

    def __enter__(self) -> "ThreadClient":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self._thread.join(PATIENCE)


@contextlib.contextmanager
def process_client(address: object, name: str) -> Iterator[Process]:
    """A client in a process of its own, killed at the end."""
    command = [sys.executable, "-m", "tests.unit.deploy.echo", str(address), name]
    environment = {**environment_of_a_process(), "FEDSHELF_ECHO_KEYS": _folder.name}
    process = Process(command, environment=environment, cwd=ROOT)
    _processes.append(process)
    try:
        yield process
    finally:
        _processes.remove(process)
        process.kill()


def expect(transport: GridTransport, kind: type[_T]) -> _T:
    """The next arrival, which must be a `kind`. Nobody waits for a client's process that has crashed."""
    deadline, arrival = time.monotonic() + PATIENCE, None
    while arrival is None and time.monotonic() < deadline:
        arrival = transport.receive(1.0)
        crashes = [ended for process in _processes if (ended := signal_of(process.poll())) in CRASHES]
        assert not crashes, f"a client's process was ended by {crashes[0]}"
    assert isinstance(arrival, kind), arrival
    return arrival


def joined(transport: GridTransport, number: int = 1) -> dict[str, str]:
    """Addresses by name of the next `number` clients to join."""
    arrivals = [expect(transport, Joined) for _ in range(number)]
    return {arrival.join.client: arrival.address for arrival in arrivals}


def pulled(session: FleetSession) -> Message:
    """The message that waits for a client whose part the test plays."""
    message = session.pull()
    assert message is not None
    return message


def content(session: FleetSession, message: Message) -> WireMessage:
    """What `message` says, its body fetched."""
    found = open_records(message.content)
    return (
        found if isinstance(found, Control) else read_records(message.content, _fetched(session, found.external_blob))
    )


def read_records(records: RecordDict, fetched: Buffer | None = None) -> WireMessage:
    """The message in `records`; `fetched` is its blob, where that is not among them."""
    found = open_records(records)
    return found if isinstance(found, Control) else found.message(fetched)


def _fetched(session: FleetSession, digest: str) -> Buffer | None:
    return session.fetch(digest) if digest else None


def reply(session: FleetSession, message: Message, answer: WireMessage) -> None:
    """Answer as the real client does: the body first."""
    parcel = to_parcel(answer)
    if parcel.blob.pieces:
        assert session.upload(parcel.blob)
    session.send(Message(parcel.records, reply_to=message))


if __name__ == "__main__":
    torch.set_num_threads(1)
    own = StoreKeys(Path(os.environ["FEDSHELF_ECHO_KEYS"], *sys.argv[1:3]))
    run_client(sys.argv[1], echo, join(sys.argv[2]), keys=own, insecure=True, max_wait=PATIENCE)
