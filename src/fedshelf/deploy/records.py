"""FedShelf's messages as Flower records.

A message is ``{"header": {"json": …}}``, and the header names the message's blob. The blob is transferred separately
(`blob_routes`) or, through a stock SuperLink, in the records as ``{"blob": {"safetensors": …}}``. Four more messages,
used only by transports, are ``{"control": {"kind": …, "reason": …}}``. Anything else is refused.

Everything that a client sends is a `Parcel`.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias, cast

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
CHUNK = 1 << 18  # bytes hashed at once


class ControlKind(StrEnum):
    """Kinds of transport messages; `NOTED` is the client's reply to all but `INTRODUCE`."""

    INTRODUCE = "introduce"
    REFUSED = "refused"
    REFUSED_FOR_NOW = "refused-for-now"
    CLOSED = "closed"
    NOTED = "noted"


@dataclass(frozen=True, kw_only=True, slots=True)
class Control:
    """A message about the connection itself.

    Attributes:
        kind: what it says.
        reason: an explanation for the user.
    """

    kind: ControlKind
    reason: str = ""


WireMessage: TypeAlias = ServerMessage | ClientMessage | Control


@dataclass(kw_only=True, slots=True, eq=False)
class Parcel:
    """A message ready to be sent.

    Attributes:
        records: the message's records.
        blob: the blob that the header names; empty if it names none.
    """

    records: RecordDict
    blob: Blob = field(default_factory=lambda: Blob(()))

    @property
    def num_header_bytes(self) -> int:
        """Payload bytes without the blob."""
        return num_bytes(self.records)

    @property
    def blob_digest(self) -> str:
        """The blob's digest, as the header names it; empty if there is none."""
        return self.blob.digest if self.blob.pieces else ""

    def payload(self) -> Iterator[Buffer]:
        """Yield the header and the blob, as they go over the wire."""
        yield str(cast("ConfigRecord", self.records["header"])["json"]).encode()
        yield from self.blob.chunks(0, CHUNK)

    def inline(self) -> RecordDict:
        """Return the records including the blob."""
        if not self.blob.pieces:
            return self.records
        return RecordDict({**self.records, "blob": _blob_record(self.blob)})


SendHook: TypeAlias = Callable[[Parcel], None]
"""Receives each outgoing parcel and may modify it before it is sent."""


class Encoder:
    """Encodes messages. A task's blobs are cached, so that N clients cost one encoding and one hash.

    A blob is identified by the identity and version counter of its tensors: one modified in place is encoded again.
    """

    def __init__(self) -> None:
        self._key: TaskKey | None = None
        self._kept: list[_Kept] = []

    def encode(self, message: ServerMessage | ClientMessage) -> Parcel:
        """Encode `message`; the parcel's blob shares the tensors' memory."""
        vectors = payload.vectors_of(message)
        if not vectors:
            return _parcel(message, Blob(()))
        key = getattr(message, "key", None)
        if key != self._key:  # another task: drop the cached blobs that it does not reuse
            self._key, self._kept = key, [kept for kept in self._kept if kept.holds(vectors)]
        kept = next((kept for kept in self._kept if kept.holds(vectors)), None)
        if kept is None:
            kept = _Kept(vectors=vectors, versions=_versions(vectors), blob=payload.blob_of(message))
            self._kept.append(kept)
        return _parcel(message, kept.blob)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Kept:
    """A cached blob and the tensor versions that it encodes."""

    vectors: dict[str, Tensor]
    versions: list[int]
    blob: Blob

    def holds(self, vectors: dict[str, Tensor]) -> bool:
        """Whether the blob encodes these tensors in their current version."""
        same = self.vectors.keys() == vectors.keys() and all(self.vectors[n] is v for n, v in vectors.items())
        return same and -1 not in self.versions and self.versions == _versions(vectors)


def to_parcel(message: WireMessage) -> Parcel:
    """Encode a single message, as a client does (see `Encoder` for the server)."""
    if isinstance(message, Control):
        reason = message.reason[:MAX_REASON_CHARACTERS]
        return Parcel(records=RecordDict({"control": ConfigRecord({"kind": str(message.kind), "reason": reason})}))
    return _parcel(message, payload.blob_of(message))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Envelope:
    """A received message with its header parsed; its blob may still have to be fetched.

    Attributes:
        header: the message's header.
        inline: the blob from the records; None if it is absent or transferred separately.
    """

    header: Header
    inline: bytes | None

    @property
    def external_blob(self) -> str:
        """Digest of the blob that is transferred separately; empty for none."""
        return self.header.blob if self.inline is None else ""

    def message(self, fetched: Buffer | None = None) -> ServerMessage | ClientMessage:
        """Decode the message.

        Args:
            fetched: the external blob; its digest was verified on receipt.

        Returns:
            The message.

        Raises:
            RefusedError: the message is invalid, for example a truncated blob, an unknown field or a value out of
                range.
        """
        if fetched is None:
            fetched = self.inline or b""
            if blobs.digest(fetched) != self.header.blob:
                raise RefusedError(
                    f"the message's blob ({len(fetched):,} bytes) is truncated or altered: its digest differs"
                )
        return self.header.message(blobs.read(fetched))


def open_records(records: RecordDict, *, most: int = payload.MAX_HEADER_BYTES) -> Control | Envelope:
    """Parse records.

    Args:
        records: the received records.
        most: maximum size of the header in bytes.

    Returns:
        The control message, or the message with its header parsed.

    Raises:
        RefusedError: these are not FedShelf records, or the header is truncated or unknown.
    """
    names = set(records)
    if names == {"control"}:
        return _control(records["control"])
    if "header" not in names or names - {"header", "blob"}:
        raise RefusedError(
            f"the message holds the records {sorted(names)}, not a header and a blob: FedShelf did not write it"
        )
    header = records["header"]
    if not isinstance(header, ConfigRecord) or set(header) != {"json"} or not isinstance(header["json"], str):
        raise RefusedError("the message's header is not one text named 'json'")
    inline = _inline(records["blob"]) if "blob" in names else None
    return Envelope(header=Header.parse(header["json"], most=most), inline=inline)


def num_bytes(records: RecordDict) -> int:
    """Return the payload bytes of records: the header and, if present, the blob."""
    total = 0
    for record in records.values():
        if isinstance(record, ConfigRecord):
            total += sum(len(value.encode()) for value in record.values() if isinstance(value, str))
        elif isinstance(record, ArrayRecord):
            total += sum(len(array.data) for array in record.values())
    return total


def message_type(message: WireMessage) -> str:
    """Return which of Flower's three entry points handles the message."""
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
            f"{tuple(array.shape)}: it is truncated, or FedShelf did not write it"
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


@functools.lru_cache(maxsize=1)  # one model is sent to many stock clients
def _blob_record(blob: Blob) -> ArrayRecord:
    data = blob.join()
    return ArrayRecord({"safetensors": Array(dtype="uint8", shape=(len(data),), stype=BLOB_TYPE, data=data)})


def _versions(vectors: dict[str, Tensor]) -> list[int]:
    # A tensor created in inference mode has no version counter, so it is encoded each time.
    return [-1 if tensor.is_inference() else tensor._version for tensor in vectors.values()]
