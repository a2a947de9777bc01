"""`Transport` over any Flower `Grid`: our embedded engine, or a stock SuperLink.

Only Flower's documented API is used: `get_node_ids`, `push_messages`, `pull_messages`. (`send_and_receive` is not:
it returns only when all are in.) A node that appears is asked to introduce itself; its `Join` makes it known to the
rounds under an address, which names this one connection: a node that left and comes back gets a new one.

One thread uses a transport.
"""

import collections
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, get_args

from flwr.app import Error, Message
from flwr.serverapp import Grid

from fedshelf.core.errors import RefusedError
from fedshelf.core.messages import ClientMessage, Failure, Join, ServerMessage, TaskKey, task_key
from fedshelf.core.ports import Arrival, Joined, Left, Reply, Undecodable
from fedshelf.deploy.wire import Control, ControlKind, Encoder, from_records, message_type, num_bytes, to_records

LOG = logging.getLogger(__name__)

# Flower's error codes (documented at flwr.app.Error) that tell of the connection rather than of the client's work.
MESSAGE_LOST = frozenset({3, 4})
NODE_UNAVAILABLE = 5


class Engine(Protocol):
    """What a transport wants from the engine around the grid, beyond the documented API."""

    def wait(self, timeout: float) -> None:
        """Return when something may have arrived, or after `timeout` seconds."""

    def forget(self, message_ids: Iterable[str]) -> None:
        """Free messages that will never be answered."""

    def announce_end(self, reason: str) -> None:
        """Tell clients, busy ones too, that the run has ended."""


class Polling:
    """The stock SuperLink: it tells nothing by itself, and frees messages at its own time."""

    def __init__(self, interval: float = 0.3) -> None:
        self._interval = interval

    def wait(self, timeout: float) -> None:
        time.sleep(min(timeout, self._interval))

    def forget(self, message_ids: Iterable[str]) -> None:
        pass

    def announce_end(self, reason: str) -> None:
        pass


@dataclass(kw_only=True, slots=True)
class _Connection:
    address: str
    node_id: int
    joined: bool = False
    refused: bool = False
    held_body: str = ""  # digest of the newest body this client was sent


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pending:
    """A message out there; `key` names its task, if it is one."""

    connection: _Connection
    key: TaskKey | None = None


class GridTransport:
    """See the module's text.

    Args:
        grid: the engine's grid, connected.
        engine: what to wait for and to clean up; `Polling` suits any grid.
        clients_keep_body: clients hold on to the newest body and do not fetch it again (ours do, stock ones do not).
        close_timeout: seconds that `close` waits for clients to take note.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        engine: Engine | None = None,
        clients_keep_body: bool = False,
        close_timeout: float = 5.0,
    ) -> None:
        self._grid = grid
        self._engine: Engine = engine or Polling()
        self._clients_keep_body = clients_keep_body
        self._close_timeout = close_timeout
        self._closed = False
        self._encoder = Encoder()
        self._arrivals: collections.deque[Arrival] = collections.deque()
        self._connections: dict[int, _Connection] = {}
        self._pending: dict[str, _Pending] = {}
        self._num_connections: collections.Counter[int] = collections.Counter()

    def send(self, address: str, message: ServerMessage) -> int:
        connection = self._find(address)
        if connection is None:
            return 0
        encoded = self._encoder.encode(message)
        key = task_key(message)
        if not self._push(connection, Message(encoded.records, connection.node_id, message_type(message)), key):
            return 0
        held = encoded.body_digest and encoded.body_digest == connection.held_body
        if encoded.body_digest:
            connection.held_body = encoded.body_digest
        return encoded.header_bytes + (0 if held and self._clients_keep_body else encoded.body_bytes)

    def receive(self, timeout: float) -> Arrival | None:
        deadline = time.monotonic() + timeout
        while True:
            if not self._arrivals:
                self._look()
            if self._arrivals:
                return self._arrivals.popleft()
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return None
            self._engine.wait(remaining)

    def refuse(self, address: str, reason: str) -> None:
        connection = self._find(address)
        if connection is None:
            return
        self._drop_pending(connection)
        connection.refused = True
        self._push_control(connection, ControlKind.REFUSED, reason)

    def close(self, reason: str) -> None:
        if self._closed:  # the run's own reason came first
            return
        self._closed = True
        self._engine.announce_end(reason)
        for connection in self._connections.values():
            self._drop_pending(connection)
            if not connection.refused:
                self._push_control(connection, ControlKind.CLOSED, reason)
        deadline = time.monotonic() + self._close_timeout
        while self._pending and (remaining := deadline - time.monotonic()) > 0:
            self._engine.wait(min(remaining, 1.0))
            self._look()
        self._arrivals.clear()

    def _find(self, address: str) -> _Connection | None:
        found = (c for c in self._connections.values() if c.address == address and not c.refused)
        return next(found, None)

    def _push(self, connection: _Connection, message: Message, key: TaskKey | None = None) -> bool:
        for message_id in self._grid.push_messages([message]):
            if message_id:
                self._pending[message_id] = _Pending(connection=connection, key=key)
                return True
        return False  # the node has gone: the next look tells

    def _push_control(self, connection: _Connection, kind: ControlKind, reason: str = "") -> None:
        control = Control(kind=kind, reason=reason)
        self._push(connection, Message(to_records(control), connection.node_id, message_type(control)))

    def _drop_pending(self, connection: _Connection) -> None:
        ids = [message_id for message_id, p in self._pending.items() if p.connection is connection]
        for message_id in ids:
            del self._pending[message_id]
        self._engine.forget(ids)

    def _look(self) -> None:
        """Notice who came and went, and take what arrived."""
        online = set(self._grid.get_node_ids())
        for node_id in self._connections.keys() - online:
            self._leave(self._connections[node_id])
        for node_id in sorted(online - self._connections.keys()):
            self._num_connections[node_id] += 1
            number = self._num_connections[node_id]
            connection = _Connection(node_id=node_id, address=f"{node_id:016x}" + (f".{number}" if number > 1 else ""))
            self._connections[node_id] = connection
            self._push_control(connection, ControlKind.INTRODUCE)
        if self._pending:
            for message in self._grid.pull_messages(list(self._pending)):
                self._take(message)

    def _leave(self, connection: _Connection) -> None:
        self._drop_pending(connection)
        del self._connections[connection.node_id]
        if connection.joined and not connection.refused:
            self._arrivals.append(Left(address=connection.address))

    def _take(self, message: Message) -> None:
        pending = self._pending.pop(message.metadata.reply_to_message_id, None)
        if pending is None:
            LOG.warning("a reply to no message of ours was dropped")
            return
        connection = pending.connection
        if message.has_error():
            self._take_error(message.error, pending)
            return
        size = num_bytes(message.content)
        try:
            content = from_records(message.content)
        except RefusedError as error:
            self._undecodable(pending, str(error), size)
            return
        if isinstance(content, Control) or connection.refused:
            return  # "noted"
        if not isinstance(content, get_args(ClientMessage)):
            self._undecodable(pending, f"a client may not send a {type(content).__name__.lower()}", size)
        elif isinstance(content, Join):
            connection.joined = True
            self._arrivals.append(Joined(address=connection.address, join=content))
        elif connection.joined:
            self._arrivals.append(Reply(address=connection.address, message=content, num_bytes=size, task=pending.key))
        else:
            reason = content.reason if isinstance(content, Failure) else "it did not introduce itself"
            LOG.warning("connection %s cannot take part: %s", connection.address, reason)

    def _take_error(self, error: Error, pending: _Pending) -> None:
        connection, reason = pending.connection, error.reason or f"error {error.code}"
        if error.code == NODE_UNAVAILABLE:
            self._leave(connection)  # should it be back already, it is introduced anew
        elif error.code in MESSAGE_LOST:
            self._undecodable(pending, reason, 0)
        elif connection.joined:
            failure = Failure(reason=f"the client's app failed: {reason}", key=pending.key)
            self._arrivals.append(Reply(address=connection.address, message=failure, num_bytes=0, task=pending.key))
        else:
            LOG.warning("connection %s cannot take part: %s", connection.address, reason)

    def _undecodable(self, pending: _Pending, reason: str, size: int) -> None:
        connection = pending.connection
        if connection.joined and not connection.refused:
            self._arrivals.append(
                Undecodable(address=connection.address, reason=reason, num_bytes=size, task=pending.key)
            )
        else:
            LOG.warning("connection %s sent what cannot be read: %s", connection.address, reason)
