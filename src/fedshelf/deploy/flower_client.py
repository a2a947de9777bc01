"""Flower's SuperNode side: one registration with one server.

This is the only module that depends on Flower's client internals. `tests/unit/deploy/test_flower_internals.py` lists
them, to detect changes in an upgrade.

Flower's own connection loop is not used: it polls every 3 s, sends heartbeats every 30 s, and ends the process when the
server restarts. Its HTTP client and thread pools are not used either: they cost more than the small messages.
"""

import contextlib
import json
import logging
import secrets
from base64 import b64decode, b64encode
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeVar, cast

from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import fleet_pb2, message_pb2
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedshelf.core.errors import IdentityError, TransportError
from fedshelf.core.text import printable
from fedshelf.deploy.blob_client import BlobClient, ReceivedBlob
from fedshelf.deploy.connection_errors import (
    PASSING_STATUSES,
    UNKNOWN_SESSION,
    CertificateRejectedError,
    ServerUnavailableError,
    SessionLostError,
)
from fedshelf.deploy.crash_reporter import TOKEN_HEADER
from fedshelf.deploy.credentials import Credentials, Signer
from fedshelf.deploy.greeting import CLOCK_HEADER, greet
from fedshelf.deploy.http_connection import Answer, HttpConnection
from fedshelf.deploy.records import MAX_REASON_CHARACTERS
from fedshelf.identity.countersignatures import Countersignature
from fedshelf.privacy.ledger_content import Recipient
from fedshelf.serialization.blob import Blob
from fedshelf.storage.hash_chain import Head

logger = logging.getLogger(__name__)

REQUEST_SECONDS = 30.0
WAIT_SECONDS = 60.0  # the server holds a wait for at most 8 s
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """An answer has arrived.

    Attributes:
        countersignature: the server's, of the head of this store's ledger; None if there is none.
    """

    countersignature: Countersignature | None


class FleetSession:
    """One registration. All methods except `wait_for_end` must be called from one thread.

    Args:
        credentials: the client's access to the server.
        held: the newest model that this client has, for example from an earlier registration.

    Attributes:
        crash_token: authenticates a crash report of this process.
        clock_ahead: seconds by which this machine's clock is ahead of the server's.
        recipient: who gets what this store sends, as its ledger names it.

    Raises:
        ServerUnavailableError: the server does not answer for now.
        IdentityError: the server does not know this client's key, or has revoked it.
        TransportError: the address answers with the wrong program, protocol or certificate, or with TLS where none is
            expected.
        RosterError: it shows a roster that this store does not accept.
    """

    def __init__(self, credentials: Credentials, held: ReceivedBlob | None = None) -> None:
        context, address = credentials.prepare(), credentials.address
        self.crash_token = secrets.token_hex(16)
        self._unanswered: message_pb2.ConfirmMessageReceivedRequest | None = None  # confirms the last message
        self._connection = HttpConnection(address, context, timeout=REQUEST_SECONDS)
        self._end_connection = HttpConnection(
            address, context, timeout=WAIT_SECONDS
        )  # a separate connection: a wait must not queue behind an upload
        try:
            server_time = self._greet(credentials, encrypted=context is not None)
            server = self._end_connection.server_fingerprint()
            self._signer = Signer(credentials.keys, server=server, server_time=server_time)
            self.clock_ahead = self._signer.clock_ahead
            self._blobs = BlobClient(
                self._connection, lambda method, path: self._signer.headers(method, path, None), held or ReceivedBlob()
            )
            credentials.keys.accept(self._roster())
            self._keys, enrollment = credentials.keys, credentials.keys.enrollment()
            self.recipient = Recipient(server=str(address), chain=enrollment.chain.text if enrollment else "")
            session = self._signer.session
            self._post("/v1/fleet/register-node", fleet_pb2.RegisterNodeFleetRequest(public_key=session))
            activate = fleet_pb2.ActivateNodeRequest(public_key=session, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
            self._node = Node(node_id=self._ask("activate-node", activate, fleet_pb2.ActivateNodeResponse).node_id)
        except BaseException:
            self._disconnect()
            raise

    def _greet(self, credentials: Credentials, *, encrypted: bool) -> float | None:
        """Greet the server; find out whether it is the certificate that it does not accept."""
        try:
            return greet(self._end_connection, credentials.address, encrypted=encrypted)
        except ServerUnavailableError:
            if not (encrypted and credentials.rejects_certificate()):
                raise
        try:
            return greet(self._end_connection, credentials.address, encrypted=encrypted)  # it may just have started
        except ServerUnavailableError as error:  # TLS 1.3 does not say why it ends the connection
            raise CertificateRejectedError(
                f"{credentials.address} does not accept this client's certificate"
            ) from error

    def refresh_roster(self) -> bool:
        """Accept the current roster, if this store pins the chain's key: stores may have been enrolled since it joined.

        Returns:
            True.

        Raises:
            RosterError: the server shows a roster that this store does not accept.
        """
        if self._keys.is_pinned:
            self._keys.accept(self._roster())
        return True

    def _roster(self) -> str:
        """Fetch the signed roster."""
        path = "/fedshelf/roster"
        headers = {**self._signer.headers("GET", path), CLOCK_HEADER: f"{self.clock_ahead:.0f}"}
        answer = self._connection.request("GET", path, headers)
        return _checked(answer).decode(errors="replace")

    def pull(self) -> Message | None:
        """Fetch the next message, without its blob. The previous message counts as done, whether answered or not.

        Returns:
            The message, or None if none arrives while the server holds the request.

        Raises:
            SessionLostError: the server does not know this registration, or sent something else.
        """
        if self._unanswered is not None:
            self._post("/v1/fleet/confirm-message-received", self._unanswered)
            self._unanswered = None
        content = self._post("/fedshelf/pull", fleet_pb2.PullMessagesRequest(node=self._node))
        if not content:
            return None
        with _reading():
            document = json.loads(content)
            response = fleet_pb2.PullMessagesResponse.FromString(b64decode(document["message"]))
            metadata = message_from_proto(response.messages_list[0]).metadata
            contents = {name: b64decode(content) for name, content in document["objects"].items()}
            message = inflate_object_from_contents(metadata.message_id, contents)
        if not isinstance(message, Message):
            raise SessionLostError("the server sent an object that is not a message")
        message.metadata.__dict__["_message_id"] = metadata.message_id
        self._unanswered = message_pb2.ConfirmMessageReceivedRequest(
            node=self._node, run_id=metadata.run_id, message_object_id=metadata.message_id
        )
        return message

    def fetch(self, digest: str) -> memoryview | None:
        """Download a message's blob. After a break, call again to resume.

        Args:
            digest: the blob's digest.

        Returns:
            The blob, or None if it was withdrawn.
        """
        return self._blobs.fetch(digest)

    def upload(self, blob: Blob) -> bool:
        """Upload an answer's blob. After a break, call again to resume.

        Args:
            blob: the blob.

        Returns:
            False if the server no longer wants it, else True.

        Raises:
            TransportError: the server will never accept it.
        """
        return self._blobs.upload(blob)

    @property
    def num_moved(self) -> int:
        """Bytes of blobs transferred so far, as a sign of progress."""
        return self._blobs.num_moved

    def send(self, answer: Message, head: Head | None = None) -> Delivery:
        """Send an answer whose blob has been uploaded. After a break, call again: nothing is delivered twice.

        Args:
            answer: the answer.
            head: the newest entry of this store's ledger; None if it has none.

        Returns:
            What the server has signed.
        """
        with no_object_id_recompute():
            answer.metadata.__dict__["_message_id"] = answer.object_id
            request = fleet_pb2.PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(remove_content_from_message(answer))],
                message_object_trees=[get_object_tree(answer)],
                clientapp_runtime_list=[0.0],
            )
            objects = {name: _text(part.deflate()) for name, part in get_all_nested_objects(answer).items()}
        document = {"reply": _text(request.SerializeToString()), "objects": objects, "ledger": head and asdict(head)}
        content = _checked(self._request("/fedshelf/push", json.dumps(document).encode(), "application/json"))
        self._unanswered = None
        return Delivery(countersignature=self._countersigned(content, head) if head else None)

    def wait_for_end(self) -> str:
        """Wait for the end of the run; also the client's heartbeat.

        Returns:
            Why the run ended, or an empty string if it did not end within some seconds.
        """
        headers = {**self._signer.headers("POST", "/fedshelf/wait"), TOKEN_HEADER: self.crash_token}
        response = self._end_connection.request("POST", "/fedshelf/wait", headers)
        content = _checked(response)
        with _reading():
            return str(json.loads(content)["end"])[:MAX_REASON_CHARACTERS]

    def leave(self) -> None:
        """Sign off, so that the server notices at once."""
        try:
            self._post("/v1/fleet/deactivate-node", fleet_pb2.DeactivateNodeRequest(node_id=self._node.node_id))
            self._post("/v1/fleet/unregister-node", fleet_pb2.UnregisterNodeFleetRequest(node_id=self._node.node_id))
        except (TransportError, IdentityError, SessionLostError):
            pass
        finally:
            self._disconnect()

    def _countersigned(self, content: bytes, head: Head) -> Countersignature | None:
        """What the server says of the ledger's head, if it is signed by the chain that this store is enrolled with."""
        try:
            found = Countersignature.of(json.loads(content)["countersignature"])
            known = self.recipient.chain, self._keys.pair().public.text, head
            if (found.chain, found.store, found.head) == known and found.is_signed:
                return found
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        logger.warning("the server did not countersign entry %d of this store's ledger", head.number)
        return None

    def _ask(self, route: str, request: Any, response_type: type[_T]) -> _T:
        """Call one of Flower's fleet routes."""
        response: Any = response_type()
        content = self._post(f"/v1/fleet/{route}", request)
        with _reading():
            response.ParseFromString(content)
        return cast("_T", response)

    def _post(self, path: str, request: Any) -> bytes:
        return _checked(self._request(path, request.SerializeToString(), "application/x-protobuf"))

    def _request(self, path: str, content: bytes, content_type: str) -> Answer:
        headers = {**self._signer.headers("POST", path, content), "content-type": content_type}
        return self._connection.request("POST", path, headers, content)

    def _disconnect(self) -> None:
        self._connection.close()
        self._end_connection.close()


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Translate parse errors: an unreadable response does not come from a FedShelf server of this version."""
    try:
        yield
    except Exception as error:
        raise SessionLostError(f"the server's answer cannot be read ({type(error).__name__})") from error


def _checked(answer: Answer) -> bytes:
    if answer.status in PASSING_STATUSES:
        raise ServerUnavailableError(f"the server answers {answer.status}")
    if answer.status == 403:
        raise IdentityError(f"the server refuses this client: {_detail(answer)}")
    if answer.status == 401 and "session" in _detail(answer):
        raise SessionLostError(UNKNOWN_SESSION)
    if answer.status != 200:
        raise SessionLostError(f"the server answers {answer.status}: {_detail(answer)}")
    return answer.content


def _detail(answer: Answer) -> str:
    """The server's reason."""
    try:
        return printable(str(json.loads(answer.content)["detail"]))[:MAX_REASON_CHARACTERS]
    except (ValueError, KeyError, TypeError, RecursionError):
        return "it does not say why"


def _text(content: bytes) -> str:
    return b64encode(content).decode("ascii")
