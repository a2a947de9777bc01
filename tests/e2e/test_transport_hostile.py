"""Whoever reaches the server's port may send anything: it is refused, and the server goes on serving the others."""

import datetime
import time
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto import fleet_pb2, message_pb2
from flwr.proto.node_pb2 import Node

from fedshelf.core.messages import PROTOCOL_VERSION, Failure, Join, Upload
from fedshelf.core.ports import Arrival, Left, Reply
from fedshelf.deploy.asgi_app import MAX_BODY_BYTES, MAX_REPORT_BYTES
from fedshelf.deploy.connection_errors import ServerUnavailableError, SessionLostError
from fedshelf.deploy.flower_client import FleetSession
from fedshelf.deploy.flower_engine import MAX_REPLY_OBJECTS
from fedshelf.deploy.flower_server import EmbeddedServer
from fedshelf.deploy.grid_transport import GridTransport
from fedshelf.deploy.records import to_parcel
from tests.ports import free_port
from tests.unit.deploy.echo import (
    PATIENCE,
    ThreadClient,
    content,
    echo,
    expect,
    join,
    joined,
    pulled,
    reply,
    task,
)

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(host="127.0.0.1", port=free_port(), tls=None) as running:
        yield running


@pytest.fixture(scope="module")
def transport(server: EmbeddedServer) -> GridTransport:
    return server.transport()


@pytest.fixture
def honest(server: EmbeddedServer, transport: GridTransport) -> Iterator[str]:
    """The address of a client that behaves; at the end it must still be served."""
    with ThreadClient(server.address, "honest"):
        address = joined(transport)["honest"]
        yield address
        transport.send(address, task(torch.ones(3)))
        reply = until(transport, Reply, address)
        assert isinstance(reply.message, Upload)
    until(transport, Left, address)


def until(transport: GridTransport, kind: type[Any], address: str) -> Any:
    """The next arrival of `kind` from `address`, past anything else."""
    for _ in range(100):
        arrival: Arrival | None = transport.receive(PATIENCE)
        assert arrival is not None
        if isinstance(arrival, kind) and arrival.address == address:
            return arrival
    raise AssertionError(f"no {kind.__name__} among 100 arrivals")


@pytest.mark.usefixtures("honest")
@pytest.mark.parametrize(
    ("report", "status"),
    [
        (b'{"token": "0123456789abcdef0123456789abcdef", "signal": "SIGSEGV"}', 404),
        (b'{"token": "", "signal": "SIGSEGV"}', 404),
        (b'{"signal": "SIGSEGV"}', 404),
        (b"[" * 1000, 404),
        (b"\xff", 404),
        (b" " * (MAX_REPORT_BYTES + 1), 413),
    ],
    ids=["unknown token", "no token", "token missing", "nested", "not text", "too large"],
)
def test_a_report_of_a_death_counts_for_whoever_has_the_clients_token_alone(
    server: EmbeddedServer, report: bytes, status: int
) -> None:
    assert httpx.post(f"http://{server.address}/fedshelf/died", content=report).status_code == status


@pytest.mark.parametrize(
    ("told", "believed"), [("SIGBUS", "SIGBUS"), ("", ""), ("SIGKILL", ""), ("\x1b[31m a forged line", "")]
)
def test_a_report_is_believed_only_where_it_names_a_crash(
    server: EmbeddedServer, transport: GridTransport, told: str, believed: str
) -> None:
    session = FleetSession(server.address, None)
    assert transport.receive(0) is None
    reply(session, pulled(session), join("dying"))
    address = joined(transport)["dying"]
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(session.wait_for_end)  # the server learns the token by that
        url, report = f"http://{server.address}/fedshelf/died", {"token": session.crash_token, "signal": told}
        deadline = time.monotonic() + PATIENCE
        while httpx.post(url, json=report).status_code != 200 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert expect(transport, Left) == Left(address=address, ended_by=believed)
        assert httpx.post(url, json=report).status_code == 404, "it is believed once"
        session.leave()
        assert isinstance(waiting.exception(PATIENCE), ServerUnavailableError)


class Intruder:
    """Speaks the fleet protocol by hand, with a key of its own."""

    def __init__(self, server: EmbeddedServer) -> None:
        self._base = f"http://{server.address}"
        self._key = ec.generate_private_key(ec.SECP384R1())
        self.public_key = self._key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        self._http = httpx.Client()

    def post(self, route: str, body: bytes, *, signed: bool = True, age: float = 0.0) -> httpx.Response:
        moment = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=age)
        timestamp = moment.isoformat()
        signature = self._key.sign(timestamp.encode(), ec.ECDSA(hashes.SHA256()))
        headers = {
            "flwr-public-key": b64encode(self.public_key).decode(),
            "flwr-signature": b64encode(signature).decode(),
            "flwr-timestamp": timestamp,
        }
        return self._http.post(f"{self._base}{route}", content=body, headers=headers if signed else {})

    def register(self) -> int:
        request = fleet_pb2.RegisterNodeFleetRequest(public_key=self.public_key)
        response = self.post("/v1/fleet/register-node", request.SerializeToString())
        assert response.status_code == 200, response.text
        answer = fleet_pb2.RegisterNodeFleetResponse.FromString(response.content)
        node_id: int = answer.node_id
        return node_id

    def __enter__(self) -> "Intruder":
        return self

    def __exit__(self, *error: object) -> None:
        self._http.close()


@pytest.fixture
def intruder(server: EmbeddedServer) -> Iterator[Intruder]:
    with Intruder(server) as somebody:
        yield somebody


def answered_by_hand(server: EmbeddedServer, transport: GridTransport) -> tuple[FleetSession, str, Message]:
    """A client whose next answer the test writes: its session, its address, and the task it has fetched."""
    session = FleetSession(server.address, None)
    assert transport.receive(0) is None
    reply(session, pulled(session), join("mallory"))
    address = joined(transport)["mallory"]
    transport.send(address, task(torch.ones(1000)))
    return session, address, pulled(session)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/control/start-run"),
        ("POST", "/v1/control/list-runs"),
        ("POST", "/v1/runtime/acquire-task"),
        ("POST", "/v1/runtime/get-nodes"),
        ("POST", "/v1/fleet/get-fab"),
        ("POST", "/v1/fleet/get-run"),
        ("POST", "/v1/fleet/"),
        ("POST", "/v1/fleet/../control/start-run"),
        ("POST", "/v1/fleet/%2e%2e/control/start-run"),
        ("GET", "/v1/fleet/pull-messages"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("GET", "/health"),
        ("GET", "/"),
        ("GET", "/fedshelf/"),
        ("POST", "/fedshelf/health"),
    ],
)
def test_only_the_fleet_routes_are_reachable(server: EmbeddedServer, method: str, path: str) -> None:
    assert httpx.request(method, f"http://{server.address}{path}").status_code == 404


def test_health_tells_version_and_protocol(server: EmbeddedServer) -> None:
    answer = httpx.get(f"http://{server.address}/fedshelf/health").json()
    assert answer["protocol"] == PROTOCOL_VERSION
    assert answer["version"]


def test_unsigned_and_stale_requests_are_refused(honest: str, intruder: Intruder) -> None:
    body = fleet_pb2.RegisterNodeFleetRequest(public_key=intruder.public_key).SerializeToString()
    assert intruder.post("/v1/fleet/register-node", body, signed=False).status_code == 401
    assert intruder.post("/v1/fleet/register-node", body, age=3600).status_code == 401
    assert intruder.post("/v1/fleet/register-node", body, age=-3600).status_code == 401
    assert intruder.post("/fedshelf/wait", b"", signed=False).status_code == 401
    assert intruder.post("/fedshelf/wait", b"").status_code == 401


@pytest.mark.parametrize("route", ["deactivate-node", "unregister-node", "pull-messages", "send-node-heartbeat"])
def test_nobody_speaks_for_another_node(honest: str, intruder: Intruder, route: str) -> None:
    intruder.register()
    victim = int(honest.partition(".")[0], 16)
    request: Any = {
        "deactivate-node": fleet_pb2.DeactivateNodeRequest(node_id=victim),
        "unregister-node": fleet_pb2.UnregisterNodeFleetRequest(node_id=victim),
        "pull-messages": fleet_pb2.PullMessagesRequest(node=Node(node_id=victim)),
        "send-node-heartbeat": fleet_pb2.PullMessagesRequest(node=Node(node_id=victim)),
    }[route]
    assert intruder.post(f"/v1/fleet/{route}", request.SerializeToString()).status_code == 401


def test_another_nodes_key_cannot_be_registered(honest: str, intruder: Intruder) -> None:
    request = fleet_pb2.RegisterNodeFleetRequest(public_key=b"somebody else's")
    assert intruder.post("/v1/fleet/register-node", request.SerializeToString()).status_code == 401


@pytest.mark.parametrize("body", [b"", b"\xff" * 100, b"\x0a\xff\xff\xff\xff\x0f", b"GET / HTTP/1.1\r\n\r\n"])
@pytest.mark.parametrize("route", ["register-node", "push-messages", "push-object", "pull-messages"])
def test_garbage_is_refused(honest: str, intruder: Intruder, route: str, body: bytes) -> None:
    assert intruder.post(f"/v1/fleet/{route}", body).status_code in {400, 401}


def test_an_oversize_request_is_refused_announced_or_not(
    honest: str, intruder: Intruder, server: EmbeddedServer
) -> None:
    assert intruder.post("/v1/fleet/push-object", b"x" * (MAX_BODY_BYTES + 1)).status_code == 413

    def endless() -> Iterator[bytes]:
        for _ in range(MAX_BODY_BYTES // (1 << 20) + 1):
            yield b"x" * (1 << 20)

    try:
        status = httpx.post(f"http://{server.address}/v1/fleet/push-object", content=endless()).status_code
    except httpx.TransportError:
        status = 413  # the server hung up while we were still sending
    assert status == 413


def push(session: FleetSession, message: Message, **changes: Any) -> Any:
    """Announce an answer to `message` with some fields of its metadata changed."""
    from flwr.common.serde import message_to_proto
    from flwr.supercore.inflatable.inflatable_object import get_object_tree

    answer = Message(to_parcel(Failure(reason="x")).records, reply_to=message)
    answer.metadata.__dict__["_message_id"] = answer.object_id
    proto, tree = message_to_proto(answer), get_object_tree(answer)
    for name, value in changes.pop("metadata", {}).items():
        setattr(proto.metadata, name, value)
    request = fleet_pb2.PushMessagesRequest(
        node=session._node, messages_list=[proto] * changes.get("copies", 1),
        message_object_trees=[changes.get("tree", tree)] * changes.get("copies", 1),
    )  # fmt: skip
    return lambda: session._ask("push-messages", request, fleet_pb2.PushMessagesResponse)


def test_an_answer_in_anothers_name_is_refused(server: EmbeddedServer, transport: GridTransport, honest: str) -> None:
    session, address, message = answered_by_hand(server, transport)
    victim = int(honest.partition(".")[0], 16)
    for metadata in (
        {"src_node_id": victim},
        {"run_id": 12345},
        {"reply_to_message_id": ""},
        {"message_id": "0" * 64},
    ):
        with pytest.raises(SessionLostError, match="403"):
            push(session, message, metadata=metadata)()
    with pytest.raises(SessionLostError, match="403"):
        push(session, message, copies=2)()
    session.leave()
    until(transport, Left, address)


def test_an_answer_to_anothers_message_is_not_taken(server: EmbeddedServer, transport: GridTransport) -> None:
    session, address, message = answered_by_hand(server, transport)
    other, other_address, other_message = answered_by_hand(server, transport)
    stolen = push(session, message, metadata={"reply_to_message_id": other_message.metadata.message_id})()
    assert not stolen.objects_to_push
    reply(other, other_message, echo(content(other, other_message)))  # type: ignore[arg-type]
    assert isinstance(until(transport, Reply, other_address).message, Upload)
    for leaving in (session, other):
        leaving.leave()
    assert {expect(transport, Left).address for _ in range(2)} == {address, other_address}


def test_an_answer_of_too_many_pieces_is_refused(server: EmbeddedServer, transport: GridTransport, honest: str) -> None:
    session, address, message = answered_by_hand(server, transport)
    answer = Message(to_parcel(Failure(reason="x")).records, reply_to=message)
    tree = message_pb2.ObjectTree(
        object_id=answer.object_id,
        children=[message_pb2.ObjectTree(object_id=f"{n:064x}") for n in range(MAX_REPLY_OBJECTS)],
    )
    with pytest.raises(SessionLostError, match="403"):
        push(session, message, tree=tree)()
    session.leave()
    until(transport, Left, address)


def test_objects_nobody_announced_are_not_stored(server: EmbeddedServer, intruder: Intruder, honest: str) -> None:
    node = Node(node_id=intruder.register())
    request = message_pb2.PushObjectRequest(
        node=node, run_id=server._engine.run.run_id, object_id="0" * 64, object_content=b"x" * 1000
    )
    response = intruder.post("/v1/fleet/push-object", request.SerializeToString())
    assert not message_pb2.PushObjectResponse.FromString(response.content).stored


@pytest.mark.parametrize("what", ["bodiless", "foreign", "wrong-direction", "empty"])
def test_an_answer_that_cannot_be_read_is_reported_and_the_others_are_unharmed(
    server: EmbeddedServer, transport: GridTransport, honest: str, what: str
) -> None:
    session, address, message = answered_by_hand(server, transport)
    wrong = to_parcel(task(torch.ones(1000)))
    assert what != "wrong-direction" or session.upload(wrong.blob)
    records = {
        "bodiless": to_parcel(echo(task(torch.ones(1000)))).records,
        "foreign": RecordDict({"photo": ConfigRecord({"bytes": b"x"})}),
        "wrong-direction": wrong.records,
        "empty": RecordDict(),
    }[what]
    session.send(Message(records, reply_to=message))
    arrival = until(transport, Reply, address)
    assert arrival.task == task(torch.ones(1)).key
    assert arrival.reason
    session.leave()
    until(transport, Left, address)


def test_objects_that_break_flowers_reader_are_reported(
    server: EmbeddedServer, transport: GridTransport, honest: str
) -> None:
    class Nonsense(ConfigRecord):  # type: ignore[misc]
        """Deflates to what announces itself as a config record, and is none."""

        def deflate(self) -> bytes:
            body = b"\xff\xff\xff\xff"
            return f"ConfigRecord  {len(body)}".encode() + b"\x00" + body

    session, address, message = answered_by_hand(server, transport)
    session.send(Message(RecordDict({"header": Nonsense()}), reply_to=message))
    assert "cannot be read" in until(transport, Reply, address).reason
    session.leave()
    until(transport, Left, address)


def test_a_half_sent_answer_is_forgotten_with_its_client(server: EmbeddedServer, transport: GridTransport) -> None:
    def kept() -> int:
        state = server._engine.state
        return int(len(state.object_store) + state.num_message_ins() + state.num_message_res())

    before = kept()
    session, address, message = answered_by_hand(server, transport)
    assert push(session, message)().objects_to_push
    assert transport.receive(0.2) is None
    assert kept() > before
    session.leave()
    assert expect(transport, Left).address == address
    assert kept() <= before


def test_a_second_introduction_is_the_rounds_business(server: EmbeddedServer, transport: GridTransport) -> None:
    """A client may answer a task with a join; the transport passes it on as what it is."""
    session, address, message = answered_by_hand(server, transport)
    reply(session, message, join("mallory-2"))
    arrival = transport.receive(PATIENCE)
    assert getattr(arrival, "address", None) == address
    assert isinstance(getattr(arrival, "join", None) or getattr(arrival, "message", None), Join)
    session.leave()
    until(transport, Left, address)
