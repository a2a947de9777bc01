"""Flower's SuperNode side: one registration at one server. The only file that knows the client side of Flower's
internals (`tests/unit/deploy/test_flower_internals.py` names each that an upgrade takes away).

Flower's own connection loop is not used: it polls every 3 s, heartbeats every 30 s, and ends the process when the
server was restarted.
"""

import email.utils
import socket
import ssl
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
    UnregisterNodeFleetRequest,
)
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes, sign_message
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedshelf.core.errors import TransportError
from fedshelf.core.messages import PROTOCOL_VERSION
from fedshelf.deploy.address import Address

REQUEST_SECONDS = 30.0
WAIT_SECONDS = 60.0  # the server holds a wait for 8 s at most
MAX_CLOCK_SKEW_SECONDS = TIMESTAMP_TOLERANCE - 60  # leave room for a slow request
_T = TypeVar("_T")


class ServerAwayError(Exception):
    """The server cannot be reached for now: try again. Never leaves this room."""


class SessionLostError(Exception):
    """The server answers, but does not know this registration (any more): register anew. Never leaves this room."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bell:
    """What a wait at the server brought: news (a message may be there), or the end of the run with its reason."""

    news: bool
    end: str


class FleetSession:
    """One registration. `pull`, `reply` and `leave` belong to one thread; `wait` may run in another.

    Args:
        address: the server's.
        context: what to check the server's certificate against; None speaks in clear.

    Raises:
        ServerAwayError: nobody answers, for now.
        TransportError: somebody answers, but not as it must be: another program, protocol, certificate, or TLS where
            there should be none.
    """

    def __init__(self, address: Address, context: ssl.SSLContext | None) -> None:
        self._address = address
        self._base = f"{'http' if context is None else 'https'}://{address}"
        verify: Any = context if context is not None else True
        self._private_key, public_key = generate_key_pairs()
        self._public_key = public_key_to_bytes(public_key)
        # A connection of its own: a wait must not queue behind an upload.
        self._http = httpx.Client(verify=verify, timeout=httpx.Timeout(REQUEST_SECONDS, read=WAIT_SECONDS))
        self._fleet = FleetHttpClient(
            self._base, verify=verify, timeout=REQUEST_SECONDS,
            interceptors=[NodeAuthHttpInterceptor(self._private_key, public_key)],
        )  # fmt: skip
        self._body: dict[str, InflatableObject] = {}  # the newest body, by content id
        try:
            self._greet()
            self._call(lambda: self._fleet.RegisterNode(RegisterNodeFleetRequest(public_key=self._public_key)))
            request = ActivateNodeRequest(public_key=self._public_key, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
            self._node = Node(node_id=self._call(lambda: self._fleet.ActivateNode(request)).node_id)
        except BaseException:
            self._disconnect()
            raise

    def pull(self) -> Message | None:
        """The next message, whole; None where there is none, or where it was withdrawn meanwhile."""
        response = self._call(lambda: self._fleet.PullMessages(PullMessagesRequest(node=self._node)))
        if not response.messages_list:
            return None
        head, tree = message_from_proto(response.messages_list[0]), response.message_object_trees[0]
        run_id, message_id = head.metadata.run_id, head.metadata.message_id
        pull_object = make_pull_object_fn_protobuf(self._fleet.PullObject, self._node, run_id)
        try:
            contents = self._call(lambda: pull_objects(self._missing(tree), pull_object_fn=pull_object))
        except ObjectPullError:
            return None
        confirm = make_confirm_message_received_fn_protobuf(self._fleet.ConfirmMessageReceived, self._node, run_id)
        self._call(lambda: confirm(message_id))
        objects = dict(self._body)
        message = inflate_object_from_contents(message_id, contents, objects=objects)
        if not isinstance(message, Message):
            raise SessionLostError("the server sent an object that is not a message")
        message.metadata.__dict__["_message_id"] = message_id
        if message.has_content() and (body := message.content.get("body")) is not None:
            self._body = {object_id: found for object_id, found in objects.items() if found is body}
        return message

    def reply(self, message: Message, records: RecordDict) -> None:
        """Answer `message`."""
        self.send(Message(records, reply_to=message))

    def send(self, answer: Message) -> None:
        """Send an answer. Where the connection breaks, call it again: what has arrived is not sent twice."""
        with no_object_id_recompute():
            answer.metadata.__dict__["_message_id"] = answer.object_id
            request = PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(remove_content_from_message(answer))],
                message_object_trees=[get_object_tree(answer)],
                clientapp_runtime_list=[0.0],
            )
            response = self._call(lambda: self._fleet.PushMessages(request))
            push = make_push_object_fn_protobuf(
                self._fleet.PushObject, self._node, answer.metadata.run_id, response.session_id
            )
            try:
                missing = set(response.objects_to_push)
                self._call(lambda: push_objects(get_all_nested_objects(answer), push, object_ids_to_push=missing))
            except ObjectPushError:
                return  # the server has withdrawn its message: it does not want the answer any more

    def wait(self) -> Bell:
        """Return when the server has something, or after some seconds without. Also this client's sign of life."""
        timestamp = now().isoformat()
        headers = {
            FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(self._public_key).decode("ascii"),
            FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(self._private_key, timestamp.encode())).decode("ascii"),
            TIMESTAMP_HEADER: timestamp,
        }
        response = self._call(lambda: self._http.post(f"{self._base}/fedshelf/wait", headers=headers))
        if response.status_code != httpx.codes.OK:
            raise SessionLostError(f"the server answers {response.status_code}")
        answer = response.json()
        return Bell(news=bool(answer["news"]), end=str(answer["end"]))

    def leave(self) -> None:
        """Sign off, so that the server need not wait to notice."""
        for sign_off in (
            lambda: self._fleet.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id)),
            lambda: self._fleet.UnregisterNode(UnregisterNodeFleetRequest(node_id=self._node.node_id)),
        ):
            try:
                self._call(sign_off)
            except (ServerAwayError, SessionLostError):
                break
        self._disconnect()

    def _missing(self, tree: ObjectTree) -> list[str]:
        """Ids of the message's objects that are not at hand, children before parents."""
        if tree.object_id in self._body:
            return []
        return [*(object_id for child in tree.children for object_id in self._missing(child)), tree.object_id]

    def _disconnect(self) -> None:
        self._fleet.close()
        self._http.close()

    def _greet(self) -> None:
        """Make sure that this is a FedShelf server of our protocol."""
        try:
            response = self._http.get(f"{self._base}/fedshelf/health")
            answer = response.json() if response.status_code == httpx.codes.OK else {}
        except httpx.TransportError as error:
            raise self._diagnose(error) from error
        except ValueError:
            answer = {}
        if "protocol" not in answer:
            raise TransportError(f"{self._address} answers, but is not a FedShelf server: check --server-address")
        if answer["protocol"] != PROTOCOL_VERSION:
            raise TransportError(
                f"the server on {self._address} (FedShelf {answer.get('version')}) speaks protocol "
                f"{answer['protocol']}, this client {PROTOCOL_VERSION}: install the same version on both"
            )
        skew = abs(now() - email.utils.parsedate_to_datetime(response.headers["date"])).total_seconds()
        if skew > MAX_CLOCK_SKEW_SECONDS:
            raise TransportError(
                f"this machine's clock and that of {self._address} differ by {skew:.0f} s, and signatures are only "
                f"valid for {TIMESTAMP_TOLERANCE} s: set the clock that is wrong"
            )

    def _diagnose(self, error: httpx.TransportError) -> Exception:
        text = str(error)
        if "CERTIFICATE_VERIFY_FAILED" in text:
            problem = (text.partition("failed: ")[2] or text).partition(" (_ssl.c")[0]
            if "mismatch" in problem:
                return TransportError(
                    f"the certificate of {self._address} is not made out to {self._address.host}: start the server "
                    f"with --address {self._address}, or use a name that is in it"
                )
            return TransportError(
                f"the certificate of {self._address} is not to be trusted ({problem}): "
                "get ca.pem from the server's operator, compare its fingerprint, and give it with --ca FILE"
            )
        if self._base.startswith("https") and any(word in text for word in ("WRONG_VERSION", "RECORD_LAYER", "HTTP_")):
            return TransportError(
                f"the server on {self._address} does not encrypt (it runs with --insecure): start it without, or, if "
                "everybody on the network between may read along, give this client --insecure, too"
            )
        if self._base.startswith("http:") and not isinstance(error, httpx.ConnectError) and self._speaks_tls():
            return TransportError(f"the server on {self._address} encrypts: run this client without --insecure")
        return ServerAwayError(_reason(error))

    def _speaks_tls(self) -> bool:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # asks only whether there is TLS
        try:
            with socket.create_connection((self._address.host, self._address.port), timeout=5) as raw:
                context.wrap_socket(raw).close()
        except OSError:
            return False
        return True

    def _call(self, request: Callable[[], _T]) -> _T:
        try:
            return request()
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            if status in (httpx.codes.BAD_GATEWAY, httpx.codes.SERVICE_UNAVAILABLE, httpx.codes.GATEWAY_TIMEOUT):
                raise ServerAwayError(f"the server answers {status}") from error
            raise SessionLostError(f"the server answers {status}") from error
        except httpx.TransportError as error:
            raise ServerAwayError(_reason(error)) from error
        except SystemExit as error:  # Flower's way of giving up
            raise SessionLostError("Flower's engine gave up on the connection") from error


def _reason(error: httpx.TransportError) -> str:
    return str(error) or type(error).__name__
