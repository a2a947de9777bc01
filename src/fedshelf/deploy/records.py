"""FedShelf's messages as Flower records, and nothing else.

A message is ``{"header": {"json": …}}``, and the header names the message's blob. The blob travels beside the records
(`blob_routes`), or, through a stock SuperLink, inside them as ``{"blob": {"safetensors": …}}``. Four more messages,
which only a transport needs, are ``{"control": {"kind": …, "reason": …}}``. Anything else is refused.

Everything that leaves a client is a `Parcel`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedshelf.core.errors import RefusedError
from fedshelf.core.messages import Broadcast, ClientMessage, Purpose, ServerMessage, TaskKey
from fedshelf.serialization import blob as blobs
from fedshelf.serialization import messages as payload
from fedshelf.serialization.blob import Blob, Buffer
from fedshelf.serialization.messages import Header

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
    """A message ready to be sent: its records, and the blob that its header names (no pieces: it has none)."""

    records: RecordDict
    blob: Blob = field(default_factory=lambda: Blob(()))

    @property
    def num_header_bytes(self) -> int:
        """Payload bytes beside the blob."""
        return num_bytes(self.records)

    def inline(self) -> RecordDict:
        """The records with the blob among them."""
        if not self.blob.pieces:
            return self.records
        return RecordDict({**self.records, "blob": _blob_record(self.blob)})


SendHook: TypeAlias = Callable[[Parcel], None]
"""Sees what leaves; what it changes, leaves changed."""


class Encoder:
    """Turns messages into parcels; a task's blobs are kept, so that N clients cost one encoding and one hash.

    A blob is recognized by the identity and version counter of its tensors: one changed in place is encoded anew.
    """

    def __init__(self) -> None:
        self._key: TaskKey | None = None
        self._kept: list[_Kept] = []

    def encode(self, message: ServerMessage | ClientMessage) -> Parcel:
        """The parcel of `message`; its blob lies in the vectors' memory."""
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
    """A blob, and which state of which tensors it is."""

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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Envelope:
    """A message that came in, its header parsed; its blob may still have to be fetched.

    Attributes:
        header: of the message.
        inline: the blob that came among the records; None: it is not there, or travels beside them.
    """

    header: Header
    inline: bytes | None

    @property
    def external_blob(self) -> str:
        """Digest of the blob that travels beside the records; "" for none."""
        return self.header.blob if self.inline is None else ""

    def message(self, fetched: Buffer | None = None) -> ServerMessage | ClientMessage:
        """The message.

        Args:
            fetched: the external blob, whose digest has been verified while it came in.

        Raises:
            RefusedError: naming what is wrong: a truncated blob, an unknown field, a value out of range.
        """
        if fetched is None:
            fetched = self.inline or b""
            if blobs.digest(fetched) != self.header.blob:
                raise RefusedError(
                    f"the message's blob ({len(fetched):,} bytes) is truncated or altered: its digest differs"
                )
        return self.header.message(blobs.read(fetched))


def open_records(records: RecordDict) -> Control | Envelope:
    """Read records back.

    Raises:
        RefusedError: naming what is wrong: not our records, a truncated or unknown header.
    """
    names = set(records)
    if names == {"control"}:
        return _control(records["control"])
    if "header" not in names or names - {"header", "blob"}:
        raise RefusedError(f"the message holds the records {sorted(names)}, not a header and a blob: it is not ours")
    header = records["header"]
    if not isinstance(header, ConfigRecord) or set(header) != {"json"} or not isinstance(header["json"], str):
        raise RefusedError("the message's header is not one text named 'json'")
    inline = _inline(records["blob"]) if "blob" in names else None
    return Envelope(header=Header.parse(header["json"]), inline=inline)


def num_bytes(records: RecordDict) -> int:
    """Payload bytes of records: header and, where it is among them, blob."""
    total = 0
    for record in records.values():
        if isinstance(record, ConfigRecord):
            total += sum(len(value.encode()) for value in record.values() if isinstance(value, str))
        elif isinstance(record, ArrayRecord):
            total += sum(len(array.data) for array in record.values())
    return total


def message_type(message: WireMessage) -> str:
    """Which of Flower's three entry points the message goes to."""
    if isinstance(message, Broadcast):
        return "train" if message.purpose is Purpose.TRAIN else "evaluate"
    return "query"


def _inline(record: object) -> bytes:
    if not isinstance(record, ArrayRecord) or set(record) != {"safetensors"}:
        raise RefusedError("the message's blob is not one array named 'safetensors'")
    array = record["safetensors"]
    if array.stype != BLOB_TYPE or array.dtype != "uint8" or tuple(array.shape) != (len(array.data),):
        raise RefusedError(
            f"the message's blob of {len(array.data):,} bytes is announced as {array.stype} {array.dtype} of shape "
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
