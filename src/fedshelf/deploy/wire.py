"""FedShelf's messages as Flower records, and nothing else.

A message is ``{"header": {"json": …}, "body": {"safetensors": …}}``; the body is an object of its own, so that
Flower's content addressing carries one model once, whoever it goes to. Three more messages, which only a transport
needs, are ``{"control": {"kind": …, "reason": …}}``. Anything else is refused.

Everything that leaves a client passes `to_records`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedshelf.core.errors import RefusedError
from fedshelf.core.messages import Broadcast, ClientMessage, CompressedBroadcast, Purpose, ServerMessage
from fedshelf.rounds import payload

BODY_TYPE = "fedshelf.safetensors"
MAX_REASON_CHARACTERS = 2000


class ControlKind(StrEnum):
    """What a transport says on its own behalf; `NOTED` is the client's answer to the last two."""

    INTRODUCE = "introduce"
    REFUSED = "refused"
    CLOSED = "closed"
    NOTED = "noted"


@dataclass(frozen=True, kw_only=True, slots=True)
class Control:
    """A message about the connection itself; `reason` is for a person."""

    kind: ControlKind
    reason: str = ""


WireMessage: TypeAlias = ServerMessage | ClientMessage | Control
SendHook: TypeAlias = Callable[[RecordDict], None]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Encoded:
    """A message ready to be sent. `body_digest` names the body, "" for none; sizes in bytes."""

    records: RecordDict
    header_bytes: int
    body_bytes: int
    body_digest: str


class Encoder:
    """Turns messages into records; the newest body is kept, so that N clients cost one encoding and one hash.

    A body is recognized by the identity and version counter of its tensors: one changed in place is encoded anew.
    """

    def __init__(self) -> None:
        self._vectors: dict[str, Tensor] = {}
        self._versions: list[int] = []
        self._record: ArrayRecord | None = None
        self._digest = ""
        self._size = 0

    def encode(self, message: ServerMessage | ClientMessage) -> Encoded:
        vectors = payload.vectors_of(message)
        records = RecordDict()
        if vectors:
            self._keep(message, vectors)
            records["body"] = self._record
        digest, size = (self._digest, self._size) if vectors else ("", 0)
        header = payload.encode_header(message, digest)
        records["header"] = ConfigRecord({"json": header})
        return Encoded(records=records, header_bytes=len(header.encode()), body_bytes=size, body_digest=digest)

    def _keep(self, message: ServerMessage | ClientMessage, vectors: dict[str, Tensor]) -> None:
        versions = [_version(vector) for vector in vectors.values()]
        same = self._vectors.keys() == vectors.keys() and all(self._vectors[n] is v for n, v in vectors.items())
        if same and versions == self._versions and -1 not in versions:
            return
        body = payload.encode_body(message)
        self._record = ArrayRecord(
            {"safetensors": Array(dtype="uint8", shape=(len(body),), stype=BODY_TYPE, data=body)}
        )
        self._digest, self._size = payload.digest(body), len(body)
        self._vectors, self._versions = vectors, versions


def to_records(message: WireMessage) -> RecordDict:
    """`message` as records, encoded on its own: a client's way out (see `Encoder` for the server's)."""
    if isinstance(message, Control):
        reason = message.reason[:MAX_REASON_CHARACTERS]
        return RecordDict({"control": ConfigRecord({"kind": str(message.kind), "reason": reason})})
    return Encoder().encode(message).records


def from_records(records: RecordDict) -> WireMessage:
    """Read a message back.

    Raises:
        RefusedError: naming what is wrong: not our records, truncated, an unknown kind or field.
    """
    names = set(records)
    if names == {"control"}:
        return _control(records["control"])
    if "header" not in names or names - {"header", "body"}:
        raise RefusedError(f"the message holds the records {sorted(names)}, not a header and a body: it is not ours")
    header = records["header"]
    if not isinstance(header, ConfigRecord) or set(header) != {"json"} or not isinstance(header["json"], str):
        raise RefusedError("the message's header is not one text named 'json'")
    return payload.decode(header["json"], _body(records.get("body")))


def num_bytes(records: RecordDict) -> int:
    """Payload bytes of a received message: header and body."""
    total = 0
    for record in records.values():
        if isinstance(record, ConfigRecord):
            total += sum(len(value.encode()) for value in record.values() if isinstance(value, str))
        elif isinstance(record, ArrayRecord):
            total += sum(len(array.data) for array in record.values())
    return total


def message_type(message: WireMessage) -> str:
    """Which of Flower's three entry points the message goes to."""
    if isinstance(message, Broadcast | CompressedBroadcast):
        return "train" if message.purpose is Purpose.TRAIN else "evaluate"
    return "query"


def _body(record: object) -> bytes:
    if record is None:
        return b""
    if not isinstance(record, ArrayRecord) or set(record) != {"safetensors"}:
        raise RefusedError("the message's body is not one array named 'safetensors'")
    array = record["safetensors"]
    if array.stype != BODY_TYPE or array.dtype != "uint8" or tuple(array.shape) != (len(array.data),):
        raise RefusedError(
            f"the message's body of {len(array.data):,} bytes is announced as {array.stype} {array.dtype} of shape "
            f"{tuple(array.shape)}: it is truncated, or not ours"
        )
    data: bytes = array.data
    return data


def _control(record: object) -> Control:
    if not isinstance(record, ConfigRecord) or set(record) != {"kind", "reason"}:
        raise RefusedError("the control message does not hold exactly a kind and a reason")
    kind, reason = record["kind"], record["reason"]
    if not isinstance(kind, str) or kind not in set(ControlKind) or not isinstance(reason, str):
        raise RefusedError("the control message's kind is unknown: the other side runs another version")
    return Control(kind=ControlKind(kind), reason=reason[:MAX_REASON_CHARACTERS])


def _version(tensor: Tensor) -> int:
    # A tensor made in inference mode counts no versions: it is then encoded each time.
    return -1 if tensor.is_inference() else tensor._version
