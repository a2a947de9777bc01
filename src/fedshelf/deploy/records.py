"""FedShelf's messages as Flower records, and nothing else.

A message is ``{"header": {"json": …}}``, and the header names the message's body. The body travels beside the records
(`blob_routes`), or, through a stock SuperLink, inside them as ``{"body": {"safetensors": …}}``. Three more messages,
which only a transport needs, are ``{"control": {"kind": …, "reason": …}}``. Anything else is refused.

Everything that leaves a client is a `Parcel`.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedshelf.core.errors import RefusedError
from fedshelf.core.messages import Broadcast, ClientMessage, CompressedBroadcast, Purpose, ServerMessage, TaskKey
from fedshelf.serialization import messages as payload
from fedshelf.serialization.blob import Blob, Buffer

BLOB_TYPE = "fedshelf.safetensors"
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


@dataclass(kw_only=True, slots=True, eq=False)
class Parcel:
    """A message ready to be sent: its records, and the body that its header names (no pieces: it has none)."""

    records: RecordDict
    blob: Blob = field(default_factory=lambda: Blob(()))

    @property
    def num_header_bytes(self) -> int:
        """Payload bytes beside the body."""
        return num_bytes(self.records)

    def inline(self) -> RecordDict:
        """The records with the body among them."""
        if not self.blob.pieces:
            return self.records
        return RecordDict({**self.records, "body": _blob_record(self.blob)})


SendHook: TypeAlias = Callable[[Parcel], None]
"""Sees what leaves; what it changes, leaves changed."""


class Encoder:
    """Turns messages into parcels; a task's bodies are kept, so that N clients cost one encoding and one hash.

    A body is recognized by the identity and version counter of its tensors: one changed in place is encoded anew.
    """

    def __init__(self) -> None:
        self._key: TaskKey | None = None
        self._kept: list[_Kept] = []

    def encode(self, message: ServerMessage | ClientMessage) -> Parcel:
        """The parcel of `message`; its body lies in the vectors' memory."""
        vectors = payload.vectors_of(message)
        if not vectors:
            return _parcel(message, Blob(()))
        key = getattr(message, "key", None)
        if key != self._key:  # another task: what it does not begin with is done with
            self._key, self._kept = key, [kept for kept in self._kept if kept.holds(vectors)]
        kept = next((kept for kept in self._kept if kept.holds(vectors)), None)
        if kept is None:
            kept = _Kept(vectors=vectors, versions=_versions(vectors), blob=payload.blob_of(message))
            self._kept.append(kept)
        return _parcel(message, kept.blob)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Kept:
    """A body, and which state of which tensors it is."""

    vectors: dict[str, Tensor]
    versions: list[int]
    blob: Blob

    def holds(self, vectors: dict[str, Tensor]) -> bool:
        same = self.vectors.keys() == vectors.keys() and all(self.vectors[n] is v for n, v in vectors.items())
        return same and -1 not in self.versions and self.versions == _versions(vectors)


def to_parcel(message: WireMessage) -> Parcel:
    """`message` encoded on its own: a client's way out (see `Encoder` for the server's)."""
    if isinstance(message, Control):
        reason = message.reason[:MAX_REASON_CHARACTERS]
        return Parcel(records=RecordDict({"control": ConfigRecord({"kind": str(message.kind), "reason": reason})}))
    return _parcel(message, payload.blob_of(message))


def header_of(records: RecordDict) -> str | None:
    """The JSON header of a message of ours that is no control message.

    Raises:
        RefusedError: naming what is wrong.
    """
    names = set(records)
    if names == {"control"}:
        return None
    if "header" not in names or names - {"header", "body"}:
        raise RefusedError(f"the message holds the records {sorted(names)}, not a header and a body: it is not ours")
    header = records["header"]
    if not isinstance(header, ConfigRecord) or set(header) != {"json"} or not isinstance(header["json"], str):
        raise RefusedError("the message's header is not one text named 'json'")
    return header["json"]


def external_blob(records: RecordDict) -> str:
    """The name of the body that travels beside these records; "" for none.

    Raises:
        RefusedError: see `header_of`.
    """
    header = header_of(records)
    return payload.blob_digest(header) if header is not None and "body" not in records else ""


def task_of(records: RecordDict) -> TaskKey | None:
    """The task that a message names in its header, which may be all of it that has come in."""
    try:
        header = header_of(records)
        key = {} if header is None else json.loads(header)["key"]
        return TaskKey(run_id=key["run_id"], round=key["round"], attempt=key["attempt"])
    except (RefusedError, ValueError, KeyError, TypeError):
        return None


def from_records(records: RecordDict, beside: Buffer | None = None) -> WireMessage:
    """Read a message back.

    Args:
        records: what came in.
        beside: the body that came in beside them, whose digest is the one that the header names.

    Raises:
        RefusedError: naming what is wrong: not our records, truncated, an unknown kind or field.
    """
    header = header_of(records)
    if header is None:
        return _control(records["control"])
    if beside is not None:
        return payload.decode(header, beside, computed=payload.blob_digest(header))
    return payload.decode(header, _blob(records.get("body")))


def num_bytes(records: RecordDict) -> int:
    """Payload bytes of records: header and, where it is among them, body."""
    total = 0
    for record in records.values():
        if isinstance(record, ConfigRecord):
            total += sum(len(value.encode()) for value in record.values() if isinstance(value, str))
        elif isinstance(record, ArrayRecord):
            total += sum(len(array.data) for array in record.values())
    return total


def message_type(message: WireMessage) -> str:
    """Which of Flower's three entry points the message goes to."""
    if isinstance(message, (Broadcast, CompressedBroadcast)):
        return "train" if message.purpose is Purpose.TRAIN else "evaluate"
    return "query"


def _blob(record: object) -> bytes:
    if record is None:
        return b""
    if not isinstance(record, ArrayRecord) or set(record) != {"safetensors"}:
        raise RefusedError("the message's body is not one array named 'safetensors'")
    array = record["safetensors"]
    if array.stype != BLOB_TYPE or array.dtype != "uint8" or tuple(array.shape) != (len(array.data),):
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


def _parcel(message: ServerMessage | ClientMessage, blob: Blob) -> Parcel:
    header = payload.encode_header(message, blob.digest if blob.pieces else "")
    return Parcel(records=RecordDict({"header": ConfigRecord({"json": header})}), blob=blob)


@functools.lru_cache(maxsize=1)  # one model goes to many stock clients
def _blob_record(blob: Blob) -> ArrayRecord:
    data = blob.join()
    return ArrayRecord({"safetensors": Array(dtype="uint8", shape=(len(data),), stype=BLOB_TYPE, data=data)})


def _versions(vectors: dict[str, Tensor]) -> list[int]:
    # A tensor made in inference mode counts no versions: it is then encoded each time.
    return [-1 if tensor.is_inference() else tensor._version for tensor in vectors.values()]
