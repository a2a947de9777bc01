"""Flower's `Grid` on the embedded engine.

Only this module and `flower_engine` depend on Flower's server internals. `tests/unit/deploy/test_flower_internals.py`
lists them, to detect changes in an upgrade.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any

from flwr.app import Error, Message, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.run import Run

from fedshelf.deploy.flower_engine import FlowerEngine
from fedshelf.deploy.grid_transport import Engine


class EmbeddedGrid(Grid, Engine):  # type: ignore[misc]  # mypy does not follow imports into Flower
    """Flower's `Grid` on the engine's state, without a socket in between.

    Args:
        engine: the engine.
        notify: called with the id of a node that has a message waiting.
        announce_end: called with the reason when the run ends.
    """

    def __init__(
        self, engine: FlowerEngine, notify: Callable[[int], None], announce_end: Callable[[str], None]
    ) -> None:
        self._engine = engine
        self._state = engine.state
        self._run = engine.run
        self._notify = notify
        self._announce_end = announce_end

    @property
    def run(self) -> Run:
        """See `Grid`."""
        return self._run

    def set_run(self, run: Run) -> None:
        """See `Grid`."""
        self._run = run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """See `Grid`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """See `Grid`."""
        self._engine.revoked()
        return list(self._state.get_nodes(self._run.run_id))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages for their nodes; the id is empty for a message whose node has left."""
        with no_object_id_recompute(), self._engine.exchange:
            return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return at most one complete reply, so that only one upload is in memory at a time."""
        for message_id in message_ids:
            reply = self._complete_reply(message_id)
            if reply is not None:
                self._engine.arrived.set()  # there may be more: check again before waiting
                return [reply]
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Not supported: waiting for all replies would not allow a quorum."""
        raise NotImplementedError("push and pull instead: waiting for all replies cannot have a quorum")

    def wait(self, timeout: float) -> None:
        """See `Engine`."""
        # A node that goes silent causes no event, so check at least every second.
        self._engine.arrived.wait(min(timeout, 1.0))
        self._engine.arrived.clear()

    def forget(self, message_ids: Iterable[str]) -> None:
        """See `Engine`."""
        with self._engine.exchange:
            for message_id in message_ids:
                reply_id = self._state.message_ins_id_to_message_res_id.get(message_id)
                self._state.delete_messages({message_id})
                for object_id in (message_id, reply_id):
                    if object_id is not None:
                        self._state.object_store.delete(object_id)

    def announce_end(self, reason: str) -> None:
        """See `Engine`."""
        self._announce_end(reason)

    def ended_by(self, node_id: int) -> str | None:
        """See `Engine`."""
        return self._engine.ended_by(node_id)

    def signed_off(self, node_id: int) -> bool:
        """See `Engine`."""
        return self._engine.signed_off(node_id)

    def name(self, node_id: int) -> str | None:
        """See `Engine`."""
        return self._engine.name(node_id)

    def revoked(self) -> Collection[str]:
        """See `Engine`."""
        return self._engine.revoked()

    def _push(self, message: Message) -> str:
        # Flower reads the run's id from a process-wide global; here each engine has its own.
        message.metadata.__dict__["_run_id"] = self._run.run_id
        message.metadata.__dict__["_message_id"] = message.object_id  # as Flower's own grid does
        session = self._state.start_session(self._run.run_id)
        head, tree, objects = (
            remove_content_from_message(message),
            get_object_tree(message),
            get_all_nested_objects(message),
        )
        stored, missing = self._state.store_message_and_object_tree(head, tree, session)
        if not stored:
            return ""
        for object_id in missing:
            self._state.store_object(self._run.run_id, session, object_id, objects[object_id].deflate())
        self._notify(message.metadata.dst_node_id)
        message_id: str = message.metadata.message_id
        return message_id

    def _complete_reply(self, message_id: str) -> Message | None:
        contents = self._complete_contents(message_id)
        if contents is None:
            return None
        reply_id, objects = contents
        # Not `get_message_res`: that replaces the reply of a node that has left since by a notice.
        reply = self._state.message_res_store.get(reply_id)
        self.forget([message_id])
        if reply is None:  # expired just now
            return None
        # The announced metadata was verified; the copy inside the objects is the client's unverified claim.
        metadata = reply.metadata
        try:
            inflated: Any = inflate_object_from_contents(reply_id, objects)
            content, error = (None, inflated.error) if inflated.has_error() else (inflated.content, None)
        except Exception as problem:  # noqa: BLE001 a hostile reply may break Flower's reader in any way
            reason = f"the reply's objects cannot be read ({type(problem).__name__})"
            content, error = None, Error(code=ErrorCode.REPLY_MESSAGE_UNAVAILABLE, reason=reason)
        return make_message(metadata=metadata, content=content, error=error)

    def _complete_contents(self, message_id: str) -> tuple[str, dict[str, bytes]] | None:
        """Return the reply's id and all its objects, or None while something is missing."""
        reply_id = self._state.message_ins_id_to_message_res_id.get(message_id)
        if reply_id is None or self._is_being_pushed(reply_id):
            return None
        store = self._state.object_store
        try:
            ids = {tree.object_id for tree in iterate_object_tree(store.get_object_tree(reply_id))}
        except NoObjectInStoreError:
            return None  # announced just now; its objects are not registered yet
        contents = {object_id: store.get(object_id) for object_id in ids}
        return (reply_id, contents) if all(contents.values()) else None

    def _is_being_pushed(self, reply_id: str) -> bool:
        """Whether the client is still sending objects, even if those of another client complete the reply."""
        session_id = self._state._object_push_session_by_root.get(reply_id)
        session = self._state._object_push_sessions.get(session_id)
        return session is not None and bool(session.pending_object_ids)
