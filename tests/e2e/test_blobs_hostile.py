"""Whoever reaches the routes of the bulk bytes may ask for anything, and gets what is theirs."""

import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from flwr.app import Message, RecordDict

from fedshelf.core.messages import Purpose, Upload
from fedshelf.core.ports import Left, Reply
from fedshelf.deploy import blob_routes as blob_routes
from fedshelf.deploy.blobs import UPLOAD_MODELS, UPLOAD_SLACK, RefusedUploadError
from fedshelf.deploy.flower_client import FleetSession
from fedshelf.deploy.flower_server import EmbeddedServer
from fedshelf.deploy.grid_transport import GridTransport
from fedshelf.deploy.http_connection import Answer, HttpConnection
from fedshelf.deploy.records import Envelope, Parcel, open_records, to_parcel
from fedshelf.serialization import blob as blobs
from tests.ports import free_port
from tests.unit.deploy.echo import PATIENCE, ThreadClient, echo, expect, join, joined, pulled, reply, task

pytestmark = pytest.mark.e2e

PARAMS = torch.arange(100_000.0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(
        host="127.0.0.1", port=free_port(), tls=None, incoming=tmp_path / "run" / "incoming"
    ) as running:
        yield running


@pytest.fixture
def transport(server: EmbeddedServer) -> GridTransport:
    return server.transport()


def blob_named(records: RecordDict) -> str:
    """Which blob travels beside `records`."""
    opened = open_records(records)
    assert isinstance(opened, Envelope)
    return opened.external_blob


class Mallory:
    """A client that has joined and was given a task, and speaks HTTP by hand from there."""

    def __init__(self, server: EmbeddedServer, transport: GridTransport, name: str = "mallory") -> None:
        self.session = FleetSession(server.address, None)
        assert transport.receive(0) is None
        reply(self.session, pulled(self.session), join(name))
        self.address = joined(transport)[name]
        transport.send(self.address, task(PARAMS))
        self.message = pulled(self.session)
        self.model = blob_named(self.message.content)
        self.line = HttpConnection(server.address, None, timeout=PATIENCE)
        self.answer: Parcel = to_parcel(echo(task(PARAMS)))

    def ask(self, method: str, digest: str, headers: Mapping[str, str] | None = None, content: bytes = b"") -> Answer:
        told = {**self.session._headers(), **(headers or {})}
        return self.line.request(method, f"/fedshelf/blobs/{digest}", told, content or None)

    def put(self, digest: str, content: bytes, *, start: int = 0, size: int | None = None) -> Answer:
        size = len(content) if size is None else size
        span = {"content-range": f"bytes {start}-{size - 1}/{size}", "content-length": str(len(content))}
        return self.ask("PUT", digest, span, content)

    def num_arrived(self, digest: str, size: int) -> Answer:
        return self.ask("HEAD", digest, {"upload-length": str(size)})

    def deliver(self, transport: GridTransport) -> None:
        """The answer at last, as an honest client gives it."""
        reply(self.session, self.message, echo(task(PARAMS)))
        arrival = expect(transport, Reply)
        assert isinstance(arrival.message, Upload)
        assert torch.equal(arrival.message.delta, PARAMS + 1)


@pytest.fixture
def mallory(server: EmbeddedServer, transport: GridTransport) -> Iterator[Mallory]:
    somebody = Mallory(server, transport)
    yield somebody
    somebody.session.leave()
    somebody.line.close()


def files(server: EmbeddedServer) -> list[Path]:
    return [path for path in server._blobs.incoming._directory.rglob("*") if path.is_file()]


def test_a_stranger_gets_nothing(server: EmbeddedServer, mallory: Mallory) -> None:
    line = HttpConnection(server.address, None, timeout=PATIENCE)
    for method in ("GET", "HEAD", "PUT"):
        assert line.request(method, f"/fedshelf/blobs/{mallory.model}", {}).status == 401
    line.close()


def test_a_node_may_fetch_what_it_was_sent_and_no_other_body(
    server: EmbeddedServer, transport: GridTransport, mallory: Mallory
) -> None:
    other = Mallory(server, transport, "other")
    assert other.ask("GET", mallory.model).status == 200  # one model for both
    transport.send(other.address, task(PARAMS + 5))
    newer = blob_named(pulled(other.session).content)
    assert mallory.ask("GET", newer).status == 404
    assert other.ask("GET", newer).status == 200
    assert other.ask("GET", mallory.model).status == 404  # a newer task has replaced it
    other.session.leave()
    assert expect(transport, Left).address == other.address
    assert other.ask("GET", newer).status == 401
    other.line.close()


@pytest.mark.parametrize(
    ("asked", "status", "span"),
    [
        ("bytes=0-", 206, (0, None)),
        ("bytes=1000-", 206, (1000, None)),
        ("bytes=8-15", 206, (8, 16)),
        ("bytes=399000-99999999", 206, (399000, None)),
        ("bytes=500000-", 416, None),
        ("bytes=9-8", 416, None),
        ("bytes=-5", 200, (0, None)),
        ("bytes=0-1,5-6", 200, (0, None)),
        ("bytes=a-b", 200, (0, None)),
        ("bytes=" + "9" * 400 + "-", 200, (0, None)),
        ("lines=0-", 200, (0, None)),
    ],
)
def test_a_range_is_honoured_or_refused_or_not_understood(
    mallory: Mallory, asked: str, status: int, span: tuple[int, int | None] | None
) -> None:
    whole = blobs.write({"params": PARAMS}).join()
    answer = mallory.ask("GET", mallory.model, {"range": asked})
    assert answer.status == status
    if span is None:
        assert answer.headers["content-range"] == f"bytes */{len(whole)}"
    else:
        assert answer.content == whole[slice(*span)]
        assert int(answer.headers["content-length"]) == len(answer.content)


@pytest.mark.parametrize(
    "path",
    [
        "..%2f..%2fetc%2fpasswd",
        "../" * 5 + "etc/passwd",
        "0" * 63,
        "0" * 65,
        "A" * 64,
        "0" * 64 + "/x",
        "0" * 64 + "?x",
    ],
)
def test_a_path_that_is_no_digest_leads_nowhere(server: EmbeddedServer, mallory: Mallory, path: str) -> None:
    for method in ("GET", "PUT", "HEAD"):
        assert mallory.ask(method, path).status in (403, 404, 400, 413)
    assert files(server) == []


def test_nothing_may_be_uploaded_unasked(server: EmbeddedServer, transport: GridTransport, mallory: Mallory) -> None:
    digest, content = mallory.answer.blob.digest, mallory.answer.blob.join()
    mallory.deliver(transport)
    assert mallory.num_arrived(digest, len(content)).status == 403  # it has answered
    transport.send(mallory.address, task(PARAMS, purpose=Purpose.EVALUATE))
    assert mallory.num_arrived(digest, len(content)).status == 403  # such a task is answered without a body
    assert mallory.put(digest, content).status == 403
    assert transport.receive(0) is None
    assert files(server) == []


def test_bytes_that_are_not_what_their_name_says_are_not_kept(
    server: EmbeddedServer, transport: GridTransport, mallory: Mallory
) -> None:
    digest, content = mallory.answer.blob.digest, mallory.answer.blob.join()
    assert mallory.put(digest, bytes(len(content))).status == 422
    assert files(server) == []
    assert mallory.num_arrived(digest, len(content)).headers["upload-offset"] == "0"
    mallory.deliver(transport)


def test_a_body_goes_on_from_where_it_is_and_nowhere_else(
    server: EmbeddedServer, transport: GridTransport, mallory: Mallory
) -> None:
    digest, content = mallory.answer.blob.digest, mallory.answer.blob.join()
    for start in (1, 1000, len(content) - 1):
        answer = mallory.put(digest, content[start:], start=start, size=len(content))
        assert (answer.status, answer.headers["upload-offset"]) == (409, "0")
    mallory.deliver(transport)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 400),
        ({"content-range": "bytes 0-9/*"}, 400),
        ({"content-range": "bytes 0-4/10"}, 400),
        ({"content-range": "bytes 10-9/10"}, 400),
        ({"content-range": "bytes -1-9/10"}, 400),
        ({"content-range": f"bytes 0-{10**14}/{10**14 + 1}"}, 400),
        ({"content-range": "bytes 0-9/10", "content-length": "9"}, 400),
    ],
)
def test_an_upload_that_does_not_say_what_it_is_is_refused(
    server: EmbeddedServer, mallory: Mallory, headers: dict[str, str], status: int
) -> None:
    content = b"x" * int(headers.get("content-length", "10"))
    assert mallory.ask("PUT", "0" * 64, {"content-length": "10", **headers}, content).status == status
    assert files(server) == []


def test_an_answer_larger_than_any_model_allows_is_refused_before_it_is_sent(
    server: EmbeddedServer, mallory: Mallory
) -> None:
    most = UPLOAD_MODELS * 4 * len(PARAMS) + UPLOAD_SLACK
    assert mallory.num_arrived("0" * 64, most).status == 204
    assert mallory.num_arrived("0" * 64, most + 1).status == 413
    assert mallory.num_arrived("0" * 64, 0).status == 413


def test_a_client_fills_the_disk_with_one_body_at_most(
    server: EmbeddedServer, transport: GridTransport, mallory: Mallory
) -> None:
    content = b"x" * 1_000_000
    for number in range(5):
        digest = f"{number:064x}"
        assert half_sent(server, mallory, digest, content) == "500000"
        assert [path.name for path in files(server)] == [digest]
    mallory.deliver(transport)
    assert transport.receive(0) is None
    assert files(server) == []


def half_sent(server: EmbeddedServer, mallory: Mallory, digest: str, content: bytes) -> str:
    """How much the server says it has after half of `content` and the end of the connection."""
    with socket.create_connection((server.address.host, server.address.port)) as raw:
        head = {
            **mallory.session._headers(), "host": "x", "content-length": str(len(content)),
            "content-range": f"bytes 0-{len(content) - 1}/{len(content)}",
        }  # fmt: skip
        lines = [f"PUT /fedshelf/blobs/{digest} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items())]
        raw.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + content[: len(content) // 2])
        raw.shutdown(socket.SHUT_WR)
        while raw.recv(1000):
            pass
    return mallory.num_arrived(digest, len(content)).headers["upload-offset"]


def test_half_a_body_and_then_silence_is_cut_off_and_can_be_gone_on_with(
    server: EmbeddedServer, transport: GridTransport, mallory: Mallory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blob_routes, "SILENCE_SECONDS", 0.2)
    digest, content = mallory.answer.blob.digest, mallory.answer.blob.join()
    half = len(content) // 2
    with (
        ThreadClient(server.address, "honest") as _,
        socket.create_connection((server.address.host, server.address.port)) as raw,
    ):
        head = {
            **mallory.session._headers(), "host": "x", "content-length": str(len(content)),
            "content-range": f"bytes 0-{len(content) - 1}/{len(content)}",
        }  # fmt: skip
        lines = [f"PUT /fedshelf/blobs/{digest} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items())]
        raw.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + content[:half])
        raw.settimeout(PATIENCE)
        assert raw.recv(1000).startswith(b"HTTP/1.1 408")
        address = joined(transport)["honest"]
        transport.send(address, task(PARAMS))
        assert expect(transport, Reply).address == address  # the others were served meanwhile
    assert expect(transport, Left).address == address
    assert mallory.num_arrived(digest, len(content)).headers["upload-offset"] == str(half)
    assert mallory.put(digest, content[half:], start=half, size=len(content)).status == 201
    mallory.deliver(transport)


def test_a_second_connection_takes_an_upload_over_from_the_first(
    server: EmbeddedServer, transport: GridTransport, mallory: Mallory
) -> None:
    digest = mallory.answer.blob.digest
    content = mallory.answer.blob.join()
    incoming, node = server._blobs.incoming, mallory.session._node.node_id
    first = incoming.open(node, digest, start=0, size=len(content))
    first.append([content[:100]])
    second = incoming.open(node, digest, start=100, size=len(content))
    with pytest.raises(RefusedUploadError):
        first.append([content[100:200]])
    second.append([content[100:]])
    second.finish()
    mallory.deliver(transport)


def test_two_clients_with_the_same_answer_do_not_share_a_file(
    server: EmbeddedServer, transport: GridTransport, mallory: Mallory
) -> None:
    other = Mallory(server, transport, "other")
    digest, content = mallory.answer.blob.digest, mallory.answer.blob.join()
    assert mallory.put(digest, content).status == 201
    assert other.num_arrived(digest, len(content)).headers["upload-offset"] == "0"
    other.deliver(transport)
    mallory.deliver(transport)
    other.session.leave()
    other.line.close()


def test_another_clients_body_cannot_be_claimed(
    server: EmbeddedServer, transport: GridTransport, mallory: Mallory
) -> None:
    other = Mallory(server, transport, "other")
    assert mallory.put(mallory.answer.blob.digest, mallory.answer.blob.join()).status == 201
    other.session.send(Message(other.answer.records, reply_to=other.message))  # names it, and has sent nothing
    arrival = expect(transport, Reply)
    assert arrival.address == other.address
    assert "did not arrive" in arrival.reason
    mallory.deliver(transport)
    other.session.leave()
    other.line.close()


def test_what_an_earlier_process_left_is_hashed_again_and_damage_is_not_believed(
    server: EmbeddedServer, transport: GridTransport, tmp_path: Path, mallory: Mallory
) -> None:
    digest, content = mallory.answer.blob.digest, mallory.answer.blob.join()
    folder = server._blobs.incoming._files["mallory"]._folder
    folder.mkdir(parents=True)
    (folder / ("1" * 64)).write_bytes(content)  # of some earlier round
    (folder / digest).write_bytes(
        content[:1000] + bytes([content[1000] ^ 1]) + content[1001:]
    )  # whole by its size, and wrong
    assert mallory.num_arrived(digest, len(content)).headers["upload-offset"] == "0"
    mallory.deliver(transport)
    transport.receive(0)
    assert [path.name for path in files(server)] == []
