"""Flower's SuperLink inside this process. The only file that knows the server side of Flower's internals
(`tests/unit/deploy/test_flower_internals.py` names each that an upgrade takes away).

The engine's database is in memory and disposable: what must survive is in the run directory.
"""

import binascii
import contextlib
import datetime
import errno
import hashlib
import logging
import os
import socket
import threading
import time
from base64 import b64decode
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self

import uvicorn
from flwr.app import Error, Message, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import (
    NOOP_FLWR_AID,
    SUPERLINK_NODE_ID,
    TIMESTAMP_HEADER,
    TIMESTAMP_TOLERANCE,
    ErrorCode,
    SubStatus,
)
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
    FLWR_IN_MEMORY_DB_NAME,
    NOOP_FEDERATION_ID,
    TaskType,
)
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app

import fedshelf
from fedshelf.core.errors import TransportError
from fedshelf.core.messages import PROTOCOL_VERSION
from fedshelf.deploy.address import Address
from fedshelf.deploy.engine_log import quiet_engine_log
from fedshelf.deploy.gate import Gate
from fedshelf.deploy.grid_transport import GridTransport
from fedshelf.deploy.tls import ServerTls

LOG = logging.getLogger(__name__)

TASK_HEARTBEAT_SECONDS = 20.0  # the engine calls a run dead after 60
MAX_REPLY_OBJECTS = 1000  # of 5 MB each: the largest reply a client may announce


class _Keeper:
    """Answers the gate from the engine's state."""

    def __init__(self, state: Any, run_id: int, silence: float) -> None:
        self._state = state
        self._run_id = run_id
        self._silence = silence
        self.arrived = threading.Event()

    def identify(self, headers: Mapping[bytes, bytes]) -> int | None:
        try:
            key = b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER.lower().encode()], validate=True)
            signature = b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER.lower().encode()], validate=True)
            timestamp = headers[TIMESTAMP_HEADER.lower().encode()]
            signed_at = datetime.datetime.fromisoformat(timestamp.decode("ascii"))
            age = abs((datetime.datetime.now(datetime.UTC) - signed_at).total_seconds())
            if age > TIMESTAMP_TOLERANCE or not verify_signature(bytes_to_public_key(key), timestamp, signature):
                return None
        except (KeyError, ValueError, TypeError, binascii.Error):
            return None
        node_id: int | None = self._state.get_node_id_by_public_key(key)
        return node_id

    def objection(self, push_messages: bytes) -> str:
        """The engine checks who is calling, but not that the reply is the caller's own; nor its size."""
        request = PushMessagesRequest()
        try:
            request.ParseFromString(push_messages)
        except Exception as error:  # noqa: BLE001 protobuf's own exception class differs between its back ends
            return f"not a protobuf message ({type(error).__name__})"
        if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
            return "a push holds exactly one reply"
        metadata, tree = request.messages_list[0].metadata, request.message_object_trees[0]
        if metadata.src_node_id != request.node.node_id:
            return f"node {request.node.node_id} answers for node {metadata.src_node_id}"
        if metadata.run_id != self._run_id:
            return f"the reply is for run {metadata.run_id}, not for this one"
        if tree.object_id != metadata.message_id:
            return "the reply's objects are not the reply's"
        if sum(1 for _ in iterate_object_tree(tree)) > MAX_REPLY_OBJECTS:
            return f"the reply consists of more than {MAX_REPLY_OBJECTS} objects"
        return ""

    def seen(self, node_id: int) -> None:
        # The engine counts a node as online for twice the interval from its last heartbeat.
        self._state.acknowledge_node_heartbeat(node_id, self._silence / 2)

    def lost(self, node_id: int) -> None:
        if self._state.deactivate_node(node_id):
            self.arrived.set()

    def news(self) -> None:
        self.arrived.set()


class EmbeddedGrid(Grid):
    """Flower's `Grid` on the engine's state, without a socket in between."""

    def __init__(self, state: Any, run: Run, gate: Gate, arrived: threading.Event) -> None:
        self._state = state
        self._run = run
        self._gate = gate
        self._arrived = arrived

    @property
    def run(self) -> Run:
        return self._run

    def set_run(self, run: Run) -> None:
        self._run = run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._state.get_nodes(self._run.run_id))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Give messages to their nodes. An empty id stands for a message whose node has gone."""
        with no_object_id_recompute():
            return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """At most one reply among those that are wholly here: one at a time keeps one upload in memory, not all."""
        for message_id in message_ids:
            reply = self._complete_reply(message_id)
            if reply is not None:
                self._arrived.set()  # there may be more: look again before waiting
                return [reply]
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError("push and pull instead: waiting for all replies cannot have a quorum")

    def wait(self, timeout: float) -> None:
        # A node falling silent makes no event: look at least every second.
        self._arrived.wait(min(timeout, 1.0))
        self._arrived.clear()

    def forget(self, message_ids: Iterable[str]) -> None:
        for message_id in message_ids:
            reply_id = self._state.message_ins_id_to_message_res_id.get(message_id)
            self._state.delete_messages({message_id})
            for object_id in (message_id, reply_id):
                if object_id is not None:
                    self._state.object_store.delete(object_id)

    def announce_end(self, reason: str) -> None:
        self._gate.announce_end(reason)

    def _push(self, message: Message) -> str:
        message.metadata.__dict__["_message_id"] = message.object_id  # as Flower's own grid does
        session = self._state.start_session(self._run.run_id)
        tree = get_object_tree(message)
        stored, missing = self._state.store_message_and_object_tree(remove_content_from_message(message), tree, session)
        if not stored:
            return ""
        objects = get_all_nested_objects(message)
        for object_id in missing:
            self._state.store_object(self._run.run_id, session, object_id, objects[object_id].deflate())
        self._gate.ring(message.metadata.dst_node_id)
        return message.metadata.message_id

    def _complete_reply(self, message_id: str) -> Message | None:
        reply_id = self._state.message_ins_id_to_message_res_id.get(message_id)
        if reply_id is None:
            return None
        store = self._state.object_store
        try:
            ids = {tree.object_id for tree in iterate_object_tree(store.get_object_tree(reply_id))}
        except NoObjectInStoreError:
            return None  # announced this instant, its objects are not registered yet
        contents = {object_id: store.get(object_id) for object_id in ids}
        if not all(contents.values()):
            return None
        replies = self._state.get_message_res({message_id}, self._run.run_id)
        if not replies or replies[0].metadata.message_id != reply_id:
            # The node went offline with its reply already here: the engine's notice of that replaces it.
            self.forget([message_id])
            return replies[0] if replies else None
        self.forget([message_id])
        # What was checked is the announced metadata; the one inside the objects is the client's word alone.
        metadata = replies[0].metadata
        try:
            inflated: Any = inflate_object_from_contents(reply_id, contents)
            content, error = (None, inflated.error) if inflated.has_error() else (inflated.content, None)
        except Exception as problem:  # noqa: BLE001 a hostile reply may break Flower's reader in any way
            reason = f"the reply's objects cannot be read ({type(problem).__name__})"
            content, error = None, Error(code=ErrorCode.REPLY_MESSAGE_UNAVAILABLE, reason=reason)
        return make_message(metadata=metadata, content=content, error=error)


class EmbeddedServer:
    """A server for clients to connect to, in threads of this process. One per process at a time.

    Args:
        host: where to listen; "" or "0.0.0.0" is everywhere.
        port: 0 takes a free one (see `address`).
        tls: certificate and key; None speaks in clear.
        silence: seconds without a sign of life after which a client counts as offline.
        grace: seconds that a client whose connection broke has to come back.

    Raises:
        TransportError: the address is in use or not this machine's.
    """

    def __init__(
        self, *, host: str, port: int, tls: ServerTls | None, silence: float = 30.0, grace: float = 3.0
    ) -> None:
        quiet_engine_log()
        self._socket = _listen(host, port)
        self.address = Address(host=host, port=self._socket.getsockname()[1])
        app = create_app(_engine_config(self.address, tls), SuperLinkLifespan)
        self._state = app.state.linkstate_factory.state()
        self._run = _start_run(self._state)
        self._keeper = _Keeper(self._state, self._run.run_id, silence)
        health = {"version": fedshelf.__version__, "protocol": PROTOCOL_VERSION}
        self._gate = Gate(app, self._keeper, health=health, hold=min(8.0, silence / 4), grace=min(grace, silence))
        self._stop = threading.Event()
        config = uvicorn.Config(
            self._gate, log_config=None, access_log=False, http="httptools", ws="none", timeout_keep_alive=75,
            timeout_graceful_shutdown=2, ssl_certfile=tls and str(tls.certificate), ssl_keyfile=tls and str(tls.key),
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._threads = [
            threading.Thread(target=self._server.run, args=([self._socket],), name="fedshelf-http", daemon=True),
            threading.Thread(target=self._keep_run_alive, name="fedshelf-engine", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        while not self._server.started:
            if not self._threads[0].is_alive():
                raise TransportError(f"the server on {self.address} did not start: see the log")
            time.sleep(0.01)

    def transport(self, *, close_timeout: float = 5.0) -> GridTransport:
        """The server's end of all connections. Ask once."""
        grid = EmbeddedGrid(self._state, self._run, self._gate, self._keeper.arrived)
        return GridTransport(grid, engine=grid, clients_keep_body=True, close_timeout=close_timeout)

    def close(self) -> None:
        """Stop listening and free the port; clients see a server that has gone away."""
        self._stop.set()
        self._server.should_exit = True
        for thread in self._threads:
            thread.join(10)
        self._socket.close()
        self._state.finish_task(self._run.primary_task_id, sub_status=SubStatus.COMPLETED, details="")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _keep_run_alive(self) -> None:
        while not self._stop.wait(TASK_HEARTBEAT_SECONDS):
            self._state.acknowledge_task_heartbeat(self._run.primary_task_id)


def _listen(host: str, port: int) -> socket.socket:
    address = str(Address(host=host or "0.0.0.0", port=port))  # noqa: S104 the caller asked for everywhere
    try:
        info = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, target = sorted(info)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family is socket.AF_INET6:
                with contextlib.suppress(OSError):
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listener.bind(target)
            listener.listen(1024)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        advice = {
            errno.EADDRINUSE: "another program (another server?) listens there; stop it, or choose --address HOST:PORT",
            errno.EADDRNOTAVAIL: "this machine does not have that address; choose another with --address HOST:PORT",
            errno.EACCES: "ports below 1024 need privileges; choose a higher one with --address HOST:PORT",
        }.get(error.errno or 0, f"{error.strerror}; choose another with --address HOST:PORT")
        raise TransportError(f"the server cannot listen on {address}: {advice}") from error
    return listener


def _engine_config(address: Address, tls: ServerTls | None) -> SuperLinkLifespanConfig:
    return SuperLinkLifespanConfig(
        control_address="", health_server_address=None, host=address.host, port=address.port, insecure=tls is None,
        certificates=None, superexec_auth_secret=os.urandom(32),  # nobody else may take tasks
        authn_plugin=NoOpControlAuthnPlugin(), event_log_plugin=None, fleet_event_log_plugin=None,
        enable_event_log=False, artifact_provider=None, enable_supernode_auth=False, fleet_api_type="grpc-rere",
        fleet_api_address=None, simulation=False, ssl_ca_certfile=None, ssl_certfile=None, ssl_keyfile=None,
        database=FLWR_IN_MEMORY_DB_NAME, isolation="process", runtime_dependency_install=False,
    )  # fmt: skip


def _start_run(state: Any) -> Run:
    """The engine's run that all messages belong to; it has nothing to do with ours, which outlives it."""
    content = b"fedshelf"
    fab_hash = state.store_fab(Fab(hashlib.sha256(content).hexdigest(), content, {}))
    run_id = state.create_run(
        "fedshelf/embedded", fedshelf.__version__, fab_hash, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID,
        TaskType.SERVER_APP,
    )  # fmt: skip
    run: Run = state.get_run_info(run_ids=[run_id])[0]
    if not (state.claim_task(run.primary_task_id) and state.activate_task(run.primary_task_id)):
        raise TransportError("Flower's engine did not start a run: its version may not be the one FedShelf pins")
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = run.primary_task_id, run_id, SUPERLINK_NODE_ID
    return run


