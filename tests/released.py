"""What a recorded client has sent, found in its bytes and compared with what its ledger says."""

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from flwr.app import ConfigRecord, Message
from flwr.proto import fleet_pb2
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

BLOBS, PUSH, DIED = "/fedshelf/blobs/", "/fedshelf/push", "/fedshelf/died"
ENVELOPE = frozenset((
    "run_id", "message_id", "src_node_id", "dst_node_id", "reply_to_message_id", "group_id", "created_at", "ttl",
    "message_type", "dst_task_id",
))  # fmt: skip


@dataclass(kw_only=True)
class Sent:
    """What a client has sent.

    Attributes:
        payloads: SHA-256 and size of each message that left whole: its header and its blob.
        crash_reports: the same of each crash report.
        blobs: the bytes of each blob, of which a part may be missing, by the digest in its path.
        heads: the heads of the ledger that it has shown.
        kinds: kinds of the messages, in order.
    """

    payloads: dict[str, int] = field(default_factory=dict)
    crash_reports: dict[str, int] = field(default_factory=dict)
    blobs: dict[str, bytearray] = field(default_factory=dict)
    heads: list[int] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)


def sent(streams: Iterable[bytes]) -> Sent:
    """What the bytes of a client's connections hold; the last request of each may be cut off."""
    found = Sent()
    requests = [request for stream in streams for request in _requests(stream)]
    for method, path, headers, body in requests:
        if method == "PUT" and path.startswith(BLOBS):
            first, _, rest = headers["content-range"].removeprefix("bytes ").partition("-")
            size = int(rest.partition("/")[2])
            blob = found.blobs.setdefault(path.removeprefix(BLOBS), bytearray())
            assert len(blob) >= int(first) or not body, "a gap"
            if len(blob) < int(first) + len(body) <= size:
                blob[int(first) :] = body
    for _, path, headers, body in requests:
        if len(body) < int(headers.get("content-length", "0")):
            continue  # cut off
        if path == PUSH:
            _add_pushed(body, found)
        elif path == DIED:
            found.crash_reports[hashlib.sha256(body).hexdigest()] = len(body)
    return found


def _add_pushed(body: bytes, found: Sent) -> None:
    """Add what one push holds; nothing but an answer, its envelope, and the ledger's head may be in it."""
    document = json.loads(body)
    assert set(document) == {"reply", "objects", "ledger"}
    pushed = fleet_pb2.PushMessagesRequest.FromString(base64.b64decode(document["reply"]))
    (outline,) = pushed.messages_list
    objects = {name: base64.b64decode(content) for name, content in document["objects"].items()}
    message = inflate_object_from_contents(outline.metadata.message_id, dict(objects))
    assert isinstance(message, Message)
    assert set(get_all_nested_objects(message)) == set(objects)
    assert {name.name for name, _ in outline.metadata.ListFields()} <= ENVELOPE, outline.metadata
    head = document["ledger"]
    if head is not None:
        assert set(head) == {"number", "hash"}
        found.heads.append(head["number"])
    records = dict(message.content)
    if set(records) == {"control"}:
        assert dict(records["control"]) == {"kind": "noted", "reason": ""}
        return
    assert set(records) == {"header"}
    assert isinstance(records["header"], ConfigRecord)
    assert set(records["header"]) == {"json"}
    text = str(records["header"]["json"])
    header = json.loads(text)
    payload = text.encode() + bytes(found.blobs.get(header["blob"], b""))
    found.kinds.append(header["kind"])
    found.payloads[hashlib.sha256(payload).hexdigest()] = len(payload)


def _requests(stream: bytes) -> Iterator[tuple[str, str, dict[str, str], bytes]]:
    rest = stream
    while rest:
        head, separator, rest = rest.partition(b"\r\n\r\n")
        if not separator:
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        method, path, _ = first.split(" ")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        size = int(headers.get("content-length", "0"))
        yield method, path, headers, rest[:size]
        rest = rest[size:]
