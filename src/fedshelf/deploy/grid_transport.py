"""`Transport` over any Flower `Grid`: the embedded engine or a stock SuperLink.

Only Flower's documented API is used: `get_node_ids`, `push_messages`, `pull_messages`. (`send_and_receive` returns only
when all replies are in, so it is not used.) A new node is asked to introduce itself. Its `Join` registers it with the
rounds under an address that names this one connection: a node that leaves and returns gets a new address.

With `Blobs`, messages are headers and blobs are transferred separately; without, blobs are inside the messages.

Not thread-safe.
"""

import collections
import logging
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import get_args

from flwr.app import Error, Message
from flwr.serverapp import Grid

from fedshelf.core.errors import RefusedError
from fedshelf.core.messages import (
    Broadcast,
    ClientMessage,
    Failure,
    Join,
    Purpose,
    ServerMessage,
    Setup,
    TaskKey,
)
from fedshelf.core.ports import Arrival, Joined, Left, Received, Reply
from fedshelf.deploy.blobs import UPLOAD_SLACK, Blobs, max_upload_bytes, model_bytes
from fedshelf.deploy.records import (
    MAX_REASON_CHARACTERS,
    Control,
    ControlKind,
    Encoder,
    Envelope,
    WireMessage,
    message_type,
    num_bytes,
    open_records,
    to_parcel,
)
from fedshelf.serialization.blob import Blob
from fedshelf.serialization.messages import MAX_CLIENT_HEADER_BYTES
from fedshelf.storage.atomic_files import map_file

logger = logging.getLogger(__name__)

WORK = tuple(kind for kind in get_args(ClientMessage) if kind is not Join)  # messages after the join

# Flower's error codes (documented at flwr.app.Error) about the connection rather than the client's work.
MESSAGE_LOST = frozenset({3, 4})
NODE_UNAVAILABLE = 5


@dataclass(kw_only=True, slots=True)
class _Connection:
    address: str
    node_id: int
    joined: bool = False
    client: str = ""  # the client's name from its `Join`
    refused: bool = False
    held_blob: str = ""  # digest of the newest blob sent to this client


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pending:
    """A message without a reply yet; `key` identifies its task, if it has one."""

    connection: _Connection
    key: TaskKey | None = None


class Engine:
    """What a transport needs around Flower's grid, beyond the documented API; here for a stock SuperLink.

    That has no notifications, frees messages on its own schedule, cannot reach busy clients, and does not tell why a
    node has left.
    """

    poll_seconds = 0.3

    def wait(self, timeout: float) -> None:
        """Return when something may have arrived, or after `timeout` seconds."""
        time.sleep(min(timeout, self.poll_seconds))

    def forget(self, message_ids: Iterable[str]) -> None:
        """Free messages that will never be answered."""

    def announce_end(self, reason: str) -> None:
        """Tell all clients, including busy ones, that the run has ended."""

    def ended_by(self, node_id: int) -> str | None:
        """Return the signal that ended the process of a node that has left (see `core.ports.Left`)."""
        return None

    def signed_off(self, node_id: int) -> bool:
        """Whether a node that has left signed off."""
        return False

    def name(self, node_id: int) -> str | None:
        """Return the name of a node's client as its key proves it; None to believe what the client says."""
        return None

    def revoked(self) -> Collection[str]:
        """Names of the clients that may no longer take part."""
        return ()


class GridTransport:
    """The transport (see the module's docstring).

    Args:
        grid: the connected grid.
        engine: notifications and cleanup; the default works with any grid.
        blobs: transfers blobs outside the messages, to clients that keep the newest one.
        close_timeout: seconds that `close` waits for clients to acknowledge.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        engine: Engine | None = None,
        blobs: Blobs | None = None,
        close_timeout: float = 5.0,
    ) -> None:
        self._grid = grid
        self._engine = engine or Engine()
        self._blobs = blobs
        self._model_bytes = 0  # of the largest model sent
        self._received: Received | None = None  # the blob of the last arrival returned
        self._close_timeout = close_timeout
        self._closed = False
        self._encoder = Encoder()
        self._arrivals: collections.deque[Arrival] = collections.deque()
        self._connections: dict[int, _Connection] = {}
        self._pending: dict[str, _Pending] = {}
        self._num_connections: collections.Counter[int] = collections.Counter()

    def send(self, address: str, message: ServerMessage) -> int:
        """See `Transport`."""
        connection = self._find(address)
        if connection is None:
            return 0
        parcel = self._encoder.encode(message)
        size, digest = parcel.num_header_bytes, parcel.blob.digest if parcel.blob.pieces else ""
        key = None
        if not isinstance(message, Setup):
            key = message.key
            if self._blobs is not None and isinstance(message, Broadcast):
                self._allow_blobs(self._blobs, connection, message, parcel.blob)
            elif self._blobs is not None and parcel.blob.pieces:  # a sum to decrypt
                self._blobs.outgoing.publish(connection.node_id, parcel.blob)
                self._blobs.incoming.expect(connection.node_id, connection.client, parcel.blob.size + UPLOAD_SLACK)
        elif self._blobs is not None and parcel.blob.pieces:
            self._blobs.outgoing.publish(connection.node_id, parcel.blob)
        records = parcel.records if self._blobs is not None else parcel.inline()
        if not self._push(connection, Message(records, connection.node_id, message_type(message)), key):
            return 0
        held = self._blobs is not None and digest == connection.held_blob
        connection.held_blob = digest or connection.held_blob
        return size if held else size + parcel.blob.size

    def receive(self, timeout: float) -> Arrival | None:
        """See `Transport`.

        Raises:
            RunError: an upload cannot be written, for example on a full disk.
        """
        deadline = time.monotonic() + timeout
        self._drop(self._received)
        self._received = None
        while True:
            if self._blobs is not None and self._blobs.incoming.problem is not None:
                raise self._blobs.incoming.problem
            if not self._arrivals:
                self._poll_nodes()
            if self._arrivals:
                arrival = self._arrivals.popleft()
                self._received = arrival.source if isinstance(arrival, Reply) else None
                return arrival
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return None
            self._engine.wait(remaining)

    def refuse(self, address: str, reason: str, *, is_final: bool = False) -> None:
        """See `Transport`."""
        connection = self._find(address)
        if connection is None:
            return
        self._drop_pending(connection)
        connection.refused = True
        self._push_control(connection, ControlKind.REFUSED if is_final else ControlKind.REFUSED_FOR_NOW, reason)

    def revoked(self) -> Collection[str]:
        """See `Transport`."""
        return self._engine.revoked()

    def close(self, reason: str) -> None:
        """See `Transport`."""
        if self._closed:  # the first reason counts
            return
        self._closed = True
        for connection in self._connections.values():
            if not connection.refused:  # one that is refused is still told why
                self._drop_pending(connection)
                self._push_control(connection, ControlKind.CLOSED, reason)
        self._engine.announce_end(reason)  # also reaches busy clients; they leave and receive no further messages
        deadline = time.monotonic() + self._close_timeout
        while self._pending and (remaining := deadline - time.monotonic()) > 0:
            self._engine.wait(min(remaining, 1.0))
            self._poll_nodes()
        self._arrivals.clear()
        if self._blobs is not None:
            self._blobs.incoming.clear()

    def _allow_blobs(self, blobs: Blobs, connection: _Connection, message: Broadcast, blob: Blob) -> None:
        """Let the connection fetch the task's blob and upload an answer's, if one is expected."""
        if blob.pieces:
            blobs.outgoing.publish(connection.node_id, blob)
        self._model_bytes = max(self._model_bytes, model_bytes(message))
        if message.purpose is Purpose.TRAIN:
            blobs.incoming.expect(connection.node_id, connection.client, max_upload_bytes(self._model_bytes))

    def _drop(self, source: Received | None) -> None:
        """Delete a received blob unless it has been moved."""
        if source is not None:
            source.path.unlink(missing_ok=True)

    def _find(self, address: str) -> _Connection | None:
        found = (c for c in self._connections.values() if c.address == address and not c.refused)
        return next(found, None)

    def _push(self, connection: _Connection, message: Message, key: TaskKey | None = None) -> bool:
        for message_id in self._grid.push_messages([message]):
            if message_id:
                self._pending[message_id] = _Pending(connection=connection, key=key)
                return True
        return False  # the node has left; the next poll notices

    def _push_control(self, connection: _Connection, kind: ControlKind, reason: str = "") -> None:
        control = Control(kind=kind, reason=reason)
        self._push(connection, Message(to_parcel(control).records, connection.node_id, message_type(control)))

    def _drop_pending(self, connection: _Connection) -> None:
        ids = [message_id for message_id, p in self._pending.items() if p.connection is connection]
        for message_id in ids:
            del self._pending[message_id]
        self._engine.forget(ids)

    def _poll_nodes(self) -> None:
        """Detect nodes that joined or left, and process arrivals."""
        online = set(self._grid.get_node_ids())
        for node_id in self._connections.keys() - online:
            connection = self._connections[node_id]
            self._receive_last(connection)
            if node_id in self._connections:
                self._leave(connection)
        for node_id in sorted(online - self._connections.keys()):
            self._num_connections[node_id] += 1
            number = self._num_connections[node_id]
            connection = _Connection(node_id=node_id, address=f"{node_id:016x}" + (f".{number}" if number > 1 else ""))
            self._connections[node_id] = connection
            self._push_control(connection, ControlKind.INTRODUCE)
        if self._pending:
            for message in self._grid.pull_messages(list(self._pending)):
                self._receive(message)

    def _receive_last(self, connection: _Connection) -> None:
        """Process what a node sent before it left: what it has done counts."""
        while ids := [message_id for message_id, p in self._pending.items() if p.connection is connection]:
            replies = list(self._grid.pull_messages(ids))
            if not replies:
                break
            for message in replies:
                self._receive(message)

    def _leave(self, connection: _Connection) -> None:
        self._drop_pending(connection)
        if self._blobs is not None:
            self._blobs.forget(connection.node_id)
        del self._connections[connection.node_id]
        node = connection.node_id
        left = Left(
            address=connection.address, ended_by=self._engine.ended_by(node), signed_off=self._engine.signed_off(node)
        )
        if connection.joined and not connection.refused:
            self._arrivals.append(left)

    def _receive(self, message: Message) -> None:
        pending = self._pending.pop(message.metadata.reply_to_message_id, None)
        if pending is None:
            logger.warning("a reply to a message that was never sent was dropped")
            return
        connection = pending.connection
        if message.has_error():
            self._receive_error(message.error, pending)
            return
        size, source = num_bytes(message.content), None
        try:
            content: WireMessage | Envelope = open_records(message.content, most=MAX_CLIENT_HEADER_BYTES)
            if isinstance(content, Envelope):
                if content.external_blob and self._blobs is not None:
                    source = self._blobs.incoming.claim(connection.node_id, content.external_blob)
                    if source is None:
                        raise RefusedError("its blob did not arrive: truncated or altered, or never sent")
                    size += source.path.stat().st_size
                content = content.message(None if source is None else map_file(source.path))
        except RefusedError as error:
            self._drop(source)
            self._unreadable(pending, str(error), size)
            return
        self._receive_content(pending, content, size, source)

    def _receive_content(self, pending: _Pending, content: WireMessage, size: int, source: Received | None) -> None:
        connection = pending.connection
        if not connection.refused and connection.joined and isinstance(content, WORK):
            self._arrivals.append(
                Reply(address=connection.address, message=content, num_bytes=size, task=pending.key, source=source)
            )
            return
        self._drop(source)
        if isinstance(content, Control) or connection.refused:
            return  # "noted"
        if not isinstance(content, get_args(ClientMessage)):
            self._unreadable(pending, f"a client may not send a {type(content).__name__.lower()}", size)
        elif isinstance(content, Join):
            join = replace(content, client=self._engine.name(connection.node_id) or content.client)
            connection.joined, connection.client = True, join.client
            self._arrivals.append(Joined(address=connection.address, join=join))
        else:
            reason = content.reason if isinstance(content, Failure) else "it did not introduce itself"
            logger.warning("connection %s cannot take part: %s", connection.address, reason)

    def _receive_error(self, error: Error, pending: _Pending) -> None:
        connection, reason = pending.connection, error.reason or f"error {error.code}"
        if error.code == NODE_UNAVAILABLE:
            self._leave(connection)  # if it is back already, it is introduced again
        elif error.code in MESSAGE_LOST and connection.joined:
            self._unreadable(pending, reason, 0)
        elif connection.joined:
            failure = Failure(reason=f"the client's app failed: {reason}", key=pending.key)
            self._arrivals.append(Reply(address=connection.address, message=failure, num_bytes=0, task=pending.key))
        else:
            logger.warning("connection %s cannot take part: %s", connection.address, reason)

    def _unreadable(self, pending: _Pending, reason: str, size: int) -> None:
        connection = pending.connection
        if connection.joined and not connection.refused:
            self._arrivals.append(
                Reply(address=connection.address, message=None, reason=reason, num_bytes=size, task=pending.key)
            )
        elif not connection.refused:  # an introduction, perhaps of too many classes: its user is told
            logger.warning(
                "connection %s sent what cannot be read: %s", connection.address, reason[:MAX_REASON_CHARACTERS]
            )
            self.refuse(connection.address, f"its introduction cannot be used: {reason}")
