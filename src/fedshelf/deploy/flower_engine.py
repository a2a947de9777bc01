"""Flower's SuperLink engine inside this process: its state and its fleet handlers.

Only this module and `flower_grid` depend on Flower's server internals. `tests/unit/deploy/test_flower_internals.py`
lists them, to detect changes in an upgrade.

Flower's web app is not used: it would add routes that start runs and hand out tasks, and nine layers of middleware
that take 3.5 ms per request. Requests are authenticated before they come here (`admission`). What Flower takes for a
node's public key is a client's session; it belongs to the key that registered it. The database is in memory and
disposable: persistent data is in the run directory.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import threading
from base64 import b64decode, b64encode
from collections.abc import Callable, Collection, Mapping
from typing import Any

from flwr.common.constant import (
    NOOP_FLWR_AID,
    SUPERLINK_NODE_ID,
    SubStatus,
)
from flwr.proto import fleet_pb2, message_pb2
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.supercore.constant import (
    NOOP_FEDERATION_ID,
    TaskType,
)
from flwr.supercore.error import FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import (
    iterate_object_tree,
)
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.servicer.fleet import fleet_handlers

import fedshelf
from fedshelf.core.errors import FedShelfError, TransportError
from fedshelf.deploy.admission import Caller
from fedshelf.identity.countersignatures import Countersignature
from fedshelf.identity.keys import PublicKey
from fedshelf.identity.roster import Roster, StoreState

logger = logging.getLogger(__name__)

MAX_REPLY_OBJECTS = 16  # a reply is a header: a message and its records, one of which holds text
_Handler = Callable[[Any, Any], Any]

HANDLERS: Mapping[str, tuple[type[Any], _Handler]] = {
    "register-node": (fleet_pb2.RegisterNodeFleetRequest, lambda r, s: fleet_handlers.register_node(r, s, False)),
    "activate-node": (fleet_pb2.ActivateNodeRequest, fleet_handlers.activate_node),
    "deactivate-node": (fleet_pb2.DeactivateNodeRequest, fleet_handlers.deactivate_node),
    "unregister-node": (fleet_pb2.UnregisterNodeFleetRequest, lambda r, s: fleet_handlers.unregister_node(r, s, False)),
    "pull-messages": (
        fleet_pb2.PullMessagesRequest, lambda r, s: fleet_handlers.pull_messages(r, s, s.object_store)
    ),
    "push-messages": (fleet_pb2.PushMessagesRequest, fleet_handlers.push_messages),
    "push-object": (message_pb2.PushObjectRequest, fleet_handlers.push_object),
    "pull-object": (message_pb2.PullObjectRequest, fleet_handlers.pull_object),
    "confirm-message-received": (
        message_pb2.ConfirmMessageReceivedRequest,
        lambda r, s: fleet_handlers.confirm_message_received(r, s, s.object_store),
    ),
}  # fmt: skip
# What clients may call directly. Whole messages go through `pull` and `push`, waiting is the heartbeat, and clients
# bring their own code.
ROUTES = frozenset({
    "register-node", "activate-node", "deactivate-node", "unregister-node", "confirm-message-received",
})  # fmt: skip
# A sign of life marks a node as online: registering must not do so (activating does), nor must leaving.
NO_SIGN_OF_LIFE = frozenset({"register-node", "deactivate-node", "unregister-node"})
# Flower registers and deletes a message's objects one by one; concurrent messages that share objects would lose them.
DONE_WITH = frozenset({"confirm-message-received", "deactivate-node"})  # routes that confirm a delivered message
ONE_AT_A_TIME = frozenset({"pull-messages", "push-messages", "confirm-message-received"})
NEWS = frozenset({"activate-node", "deactivate-node", "push-messages", "push-object"})


class FlowerEngine:
    """The engine's state with one run, and the operations that the ASGI app needs. Thread-safe.

    Args:
        silence: seconds without a sign of life after which a node counts as offline.
        roster: returns the current roster, the same object as long as it does not change.
        countersign: signs what a caller's push shows as the head of its ledger (see `LedgerHeads.countersign`).
    """

    def __init__(
        self, *, silence: float, roster: Callable[[], Roster] = Roster,
        countersign: Callable[[str, PublicKey, object], Countersignature | None] = lambda store, key, shown: None,
    ) -> None:  # fmt: skip
        self.state: Any = InMemoryLinkState(NoOpFederationManager(simulation=False), InMemoryObjectStore())
        self.run = _start_run(self.state)
        self.arrived = threading.Event()
        self.exchange = threading.RLock()  # held while a message's objects are registered or deleted
        self._silence = silence
        self._countersign = countersign
        self._taken: dict[int, bytes] = {}  # by node: delivered but not confirmed
        self._ended_by: dict[int, str] = {}  # by node: the signal that ended its process
        self._signed_off: set[int] = set()
        self._roster, self._known_roster = roster, Roster()
        self._revoked: Collection[str] = frozenset()  # names in the known roster
        self._sessions: dict[str, bytes] = {}  # by key: its newest session
        self._names: dict[int, str] = {}  # by node: the store's name in the roster
        self._delivered: dict[int, str] = {}  # by node: the newest message that it fetched

    def serve(self, route: str, caller: Caller, blob: bytes) -> tuple[int, bytes]:
        """Handle a request to one of `HANDLERS`.

        Args:
            route: the handler's name.
            caller: who sent it.
            blob: the request's body.

        Returns:
            HTTP status and body (protobuf, or JSON for statuses from 400).
        """
        request_type, handler = HANDLERS[route]
        request = request_type()
        try:
            request.ParseFromString(blob)
        except Exception as error:  # noqa: BLE001 protobuf's own exception class differs between its back ends
            return _refusal(400, f"not a protobuf message ({type(error).__name__})")
        if route == "register-node":
            self._begin_session(caller)
        node_id = self._claimed_node(request, caller)
        if node_id is None:
            return _refusal(401, "the request is not of the session that it speaks of")
        if route == "confirm-message-received" and request.message_object_id != self._delivered.get(node_id):
            return _refusal(400, "it confirms a message that this client did not fetch")
        if route == "push-messages" and (objection := self._objection(request)):
            logger.warning("node %016x sent a reply that is refused: %s", node_id, objection)
            return _refusal(400, objection)
        try:
            with self.exchange if route in ONE_AT_A_TIME else contextlib.nullcontext():
                answer = handler(request, self.state).SerializeToString()
        except FlowerError as error:
            return _refusal(409, f"refused by Flower's engine (code {error.code})")
        except Exception as error:  # noqa: BLE001 a hostile request must not stop the server
            logger.warning("node %016x sent a request to %s that fails: %r", node_id, route, error)
            return _refusal(400, "the request is malformed")
        if route == "deactivate-node":
            self._signed_off.add(node_id)
        if route not in NO_SIGN_OF_LIFE:
            self.seen(node_id or self.state.get_node_id_by_public_key(caller.session))
        if route == "activate-node":
            self._names[self.state.get_node_id_by_public_key(caller.session)] = caller.name
        if route in NEWS:
            self.arrived.set()
        if route in DONE_WITH:
            self._taken.pop(node_id, None)
        return 200, answer

    def pull(self, caller: Caller, blob: bytes) -> tuple[int, bytes]:
        """Return a message with all its objects.

        The same message is returned until the node has answered or confirmed it, because the connection may break
        during the response.

        Returns:
            HTTP status and body; the body is empty if there is no message.
        """
        status, content = self.serve("pull-messages", caller, blob)
        if status != 200:
            return status, content
        node = fleet_pb2.PullMessagesRequest.FromString(blob).node
        pulled = fleet_pb2.PullMessagesResponse.FromString(content)
        if not pulled.messages_list:
            return 200, self._taken.get(node.node_id, b"")
        run_id, objects = pulled.messages_list[0].metadata.run_id, {}
        for part in iterate_object_tree(pulled.message_object_trees[0]):
            request = message_pb2.PullObjectRequest(node=node, run_id=run_id, object_id=part.object_id)
            status, found = self.serve("pull-object", caller, request.SerializeToString())
            if status != 200:
                return status, found
            response = message_pb2.PullObjectResponse.FromString(found)
            if not (response.object_found and response.object_available):
                return 200, b""  # withdrawn just now
            objects[part.object_id] = b64encode(response.object_content).decode()
        document = json.dumps({"message": b64encode(content).decode(), "objects": objects}).encode()
        self._taken[node.node_id] = document
        self._delivered[node.node_id] = pulled.messages_list[0].metadata.message_id
        return 200, document

    def push(self, caller: Caller, blob: bytes) -> tuple[int, bytes]:
        """Accept a reply with all its objects, and confirm the message that it answers.

        Args:
            caller: who sent it.
            blob: ``{"reply": …, "objects": {id: …}, "ledger": {"number": …, "hash": …}}``: a `push-messages` request,
                the objects that would follow it, and the head of the store's ledger, if it has one.

        Returns:
            HTTP status and body (JSON): ``{"countersignature": …}`` of that head, or None.
        """
        try:
            document = json.loads(blob)
            announced = fleet_pb2.PushMessagesRequest.FromString(b64decode(document["reply"], validate=True))
            objects = {str(name): b64decode(content, validate=True) for name, content in document["objects"].items()}
        except Exception as error:  # noqa: BLE001 protobuf's own exception class differs between its back ends
            return _refusal(400, f"not a reply and its objects ({type(error).__name__})")
        status, content = self.serve("push-messages", caller, announced.SerializeToString())
        if status != 200:
            return status, content
        pushed = fleet_pb2.PushMessagesResponse.FromString(content)
        if not objects.keys() >= set(pushed.objects_to_push):
            return _refusal(400, "a part of the reply is missing")
        for object_id in pushed.objects_to_push:
            request = message_pb2.PushObjectRequest(
                node=announced.node, run_id=announced.messages_list[0].metadata.run_id, object_id=object_id,
                object_content=objects[object_id], session_id=pushed.session_id,
            )  # fmt: skip
            status, content = self.serve("push-object", caller, request.SerializeToString())
            if status != 200:
                return status, content
        metadata = announced.messages_list[0].metadata
        confirmation = message_pb2.ConfirmMessageReceivedRequest(
            node=announced.node, run_id=metadata.run_id, message_object_id=metadata.reply_to_message_id
        )
        status, content = self.serve("confirm-message-received", caller, confirmation.SerializeToString())
        if status != 200:
            return status, content
        signed = self._countersign(caller.name, caller.key, document.get("ledger"))
        return 200, json.dumps({"countersignature": signed and signed.fields}).encode()

    def node_of(self, caller: Caller) -> int | None:
        """The node of the caller's session; None if it is not registered."""
        if self._sessions.get(caller.key.text) != caller.session:
            return None
        node_id: int | None = self.state.get_node_id_by_public_key(caller.session)
        return node_id

    def name(self, node_id: int) -> str | None:
        """The store's name in the roster."""
        return self._names.get(node_id)

    def revoked(self) -> Collection[str]:
        """End the nodes of keys that were revoked since the last call; return the names of all revoked stores."""
        try:
            roster = self._roster()
        except FedShelfError:  # damaged or not readable: reported with the next request
            return self._revoked
        if roster is not self._known_roster:
            self._known_roster, self._revoked = roster, roster.revoked_names()
            found = [roster.find(PublicKey(key)) for key in list(self._sessions)]
            for entry in [entry for entry in found if entry is not None and entry.state is StoreState.REVOKED]:
                # Without its session, a request in progress does not bring the node back.
                node_id = self.state.get_node_id_by_public_key(self._sessions.pop(entry.key.text))
                if node_id is not None:
                    self.lost(node_id)
        return self._revoked

    def seen(self, node_id: int) -> None:
        """Record a sign of life."""
        # The engine counts a node as online for twice the interval since its last heartbeat.
        self.state.acknowledge_node_heartbeat(node_id, self._silence / 2)

    def lost(self, node_id: int, ended_by: str | None = None) -> None:
        """Record that the node's connection is lost or its process ended (see `core.ports.Left.ended_by`)."""
        self._taken.pop(node_id, None)
        self._delivered.pop(node_id, None)
        if ended_by is not None:
            self._ended_by[node_id] = ended_by
        if self.state.deactivate_node(node_id):
            self.arrived.set()
        else:  # it had already left
            self._ended_by.pop(node_id, None)

    def ended_by(self, node_id: int) -> str | None:
        """Return and forget the signal that ended the process of a node that has left."""
        return self._ended_by.pop(node_id, None)

    def signed_off(self, node_id: int) -> bool:
        """Return and forget whether a node that has left signed off."""
        said = node_id in self._signed_off
        self._signed_off.discard(node_id)
        return said

    def keep_alive(self) -> None:
        """Send the run's own heartbeat. Call it at least once a minute, or the engine considers the run dead."""
        self.state.acknowledge_task_heartbeat(self.run.primary_task_id)

    def finish(self) -> None:
        """Mark the run as finished."""
        self.state.finish_task(self.run.primary_task_id, sub_status=SubStatus.COMPLETED, details="")

    def _begin_session(self, caller: Caller) -> None:
        """Make this the only session of its key: a client that starts again has lost the one before."""
        before = self._sessions.get(caller.key.text)
        if before is not None and before != caller.session:
            node_id = self.state.get_node_id_by_public_key(before)
            if node_id is not None:
                self.lost(node_id)
        self._sessions[caller.key.text] = caller.session

    def _claimed_node(self, request: Any, caller: Caller) -> int | None:
        """Return the node id in `request` if it is that of the caller's session; 0 if it has none yet."""
        if self._sessions.get(caller.key.text) != caller.session:
            return None
        if hasattr(request, "public_key"):
            return 0 if request.public_key == caller.session else None
        claimed: int = request.node.node_id if hasattr(request, "node") else request.node_id
        return claimed if claimed and self.state.get_node_id_by_public_key(caller.session) == claimed else None

    def _objection(self, request: Any) -> str:
        """Explain why a reply is refused. The engine does not check that it is the caller's own."""
        if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
            return "a push holds exactly one reply"
        metadata, tree = request.messages_list[0].metadata, request.message_object_trees[0]
        if metadata.src_node_id != request.node.node_id:
            return f"it answers for node {metadata.src_node_id:016x}"
        if metadata.run_id != self.run.run_id:
            return f"it is for run {metadata.run_id}, not for this one"
        if not metadata.reply_to_message_id:
            return "it answers nothing"
        if tree.object_id != metadata.message_id:
            return "its objects are not its own"
        ids = [part.object_id for part in itertools.islice(iterate_object_tree(tree), MAX_REPLY_OBJECTS + 1)]
        if len(ids) > MAX_REPLY_OBJECTS:
            return f"it consists of more than {MAX_REPLY_OBJECTS} objects"
        return "" if len(set(ids)) == len(ids) else "its objects contain themselves"


def _start_run(state: Any) -> Run:
    """Start the engine's run, which all messages belong to. It is unrelated to FedShelf's run, which outlives it."""
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


def _refusal(status: int, reason: str) -> tuple[int, bytes]:
    return status, json.dumps({"detail": reason}).encode()
