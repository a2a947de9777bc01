"""Messages as a JSON header and a blob of vectors.

The header holds the message's plain fields and the blob's digest; the blob (see `serialization.blob`) holds only its
vectors, so that one model has one blob for all recipients. Objects that are not declared in `core.messages` cannot be
sent: unknown kinds, fields and tensors are refused on both sides, and pickle is never used.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from fedshelf.core import messages
from fedshelf.core.encoded import Encoded
from fedshelf.core.errors import RefusedError
from fedshelf.core.messages import (
    AUXILIARY,
    DELTA,
    FROZEN,
    PARAMS,
    TEACHER,
    Broadcast,
    ClientMessage,
    ServerMessage,
    Setup,
    TaskKey,
    Upload,
    Vector,
)  # fmt: skip
from fedshelf.core.text import counted
from fedshelf.serialization import blob as blobs
from fedshelf.serialization.blob import Blob, Buffer

Message: TypeAlias = ServerMessage | ClientMessage

KINDS: Mapping[str, type[Any]] = {
    kind.__name__.lower(): kind
    for kind in (
        messages.Join, Setup, messages.Ready, Broadcast, Upload, messages.Evaluation, messages.Comparison,
        messages.MaskingRequest, messages.MaskingReply, messages.EncryptionRequest, messages.EncryptionReply,
        messages.Failure,
    )
}  # fmt: skip
MAIN_VECTORS: Mapping[type[Any], str] = {
    Setup: FROZEN, Broadcast: PARAMS, Upload: DELTA, messages.EncryptionRequest: "", messages.EncryptionReply: "",
}  # fmt: skip
"""The messages that carry vectors, and the name of their main vector if it is plain; "" if all are encoded."""
_CARRIERS = tuple(MAIN_VECTORS)
_PARTS = (TaskKey, messages.ClassFolder, messages.ModelDelta, messages.ProductCount, messages.CandidateScore, Encoded)
for _checked in (*KINDS.values(), *_PARTS):
    # Pydantic reads a dataclass's rules from the class. They are set here because core does not depend on pydantic.
    setattr(_checked, "__pydantic_config__", ConfigDict(extra="forbid", arbitrary_types_allowed=True))  # noqa: B010
_ADAPTERS: Mapping[type[Any], TypeAdapter[Any]] = {kind: TypeAdapter(kind) for kind in KINDS.values()}
MAX_HEADER_BYTES = 64 << 20  # of a server's message: a setup holds the catalogue of all stores
MAX_CLIENT_HEADER_BYTES = 4 << 20  # of a client's message: a join lists its class folders
MAX_ENCODED = 1 << 40  # values of an encoded vector
_MOST_PROBLEMS, _MOST_CHARACTERS = 5, 100  # of a malformed message, told in one reason
_KEY: TypeAdapter[TaskKey] = TypeAdapter(TaskKey)


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """A received message without its vectors.

    Attributes:
        kind: the message's class.
        fields: its fields, not validated yet; for encoded vectors, their codec, size and parts.
        blob: digest of the blob that holds its vectors; "" for none.
    """

    kind: type[Any]
    fields: Mapping[str, Any]
    blob: str

    @classmethod
    def parse(cls, text: str, *, most: int = MAX_HEADER_BYTES) -> "Header":
        """Parse the output of `encode_header`.

        Args:
            text: the header.
            most: maximum size in bytes; a larger one is refused before it is parsed.

        Raises:
            RefusedError: it is not one of our headers.
        """
        fields = _load(text, most)
        kind, digest = KINDS.get(str(fields.pop("kind", ""))), fields.pop("blob", None)
        if kind is None:
            raise RefusedError("the message's kind is unknown: the other side runs another version")
        if not isinstance(digest, str):
            raise RefusedError("the message's header does not say which blob belongs to it")
        return cls(kind=kind, fields=fields, blob=digest)

    @property
    def task(self) -> TaskKey | None:
        """The task that the message names; None if it names none."""
        try:
            return _KEY.validate_python(self.fields.get("key"))
        except ValidationError:
            return None

    def message(self, vectors: Mapping[str, Tensor]) -> Message:
        """The complete message, validated as far as possible without the model.

        Args:
            vectors: by their names in the blob; the caller has verified that they are those of `blob`.

        Raises:
            RefusedError: an unknown field or vector, or a value out of range; the message names it.
        """
        name, fields, rest = self.kind.__name__.lower(), dict(self.fields), dict(vectors)
        if self.kind in MAIN_VECTORS:
            main = MAIN_VECTORS[self.kind]
            fields["vectors"] = joined = _join_vectors(fields.get("vectors"), rest, main)
            encoded = any(isinstance(vector, Encoded) for vector in joined.values())
            if self.kind is Setup:
                named = {vector for vector, field in ((main, "frozen"), (TEACHER, "teacher")) if fields.get(field)}
                if encoded or set(joined) != named:
                    what = " and ".join(sorted(named)) or "no vector"
                    raise RefusedError(f"the setup does not hold {what} alone, as it says")
            elif main and (main in joined) == (encoded or bool(fields.get("model"))):
                raise RefusedError(
                    f"the {name} holds {'both' if encoded else 'neither'} a vector {main!r} or encoded ones"
                )
        if rest:
            raise RefusedError(f"a {name} may not carry {_listed(rest)}")
        try:
            message: Message = _ADAPTERS[self.kind].validate_python(fields)
        except ValidationError as error:
            problems = error.errors(include_url=False, include_context=False, include_input=False)
            told = [f"{_short('.'.join(map(str, problem['loc'])))}: {problem['msg']}" for problem in problems]
            more = f"; and {counted(len(told) - _MOST_PROBLEMS, 'more problem')}" if len(told) > _MOST_PROBLEMS else ""
            raise RefusedError(f"the {name} is malformed: {'; '.join(told[:_MOST_PROBLEMS])}{more}") from None
        return message


def encode_header(message: Message, blob_digest: str) -> str:
    """The message's plain fields as JSON, with its kind and the digest of its blob ("" for none)."""
    header = {"kind": type(message).__name__.lower(), "blob": blob_digest, **_plain_fields(message)}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":"))
    return text.encode(errors="replace").decode()  # a file name in a reason may hold undecodable bytes


def blob_of(message: Message) -> Blob:
    """The message's vectors, ready to send, without copying; without pieces if it has none."""
    return blobs.write(vectors_of(message))


def size(message: Message) -> tuple[int, int]:
    """Sizes in bytes of (header, blob), without making the blob."""
    vectors = vectors_of(message)
    return len(encode_header(message, "0" * 64 if vectors else "").encode()), blobs.size_of(vectors)


def decode(header: str, blob: Buffer) -> Message:
    """Decode a message.

    Args:
        header: see `encode_header`.
        blob: the message's vectors; they become views of it if it is writable.

    Raises:
        RefusedError: not our format, truncated, an unknown kind or field, or a value out of range; the message
            names it.
    """
    parsed = Header.parse(header)
    if parsed.blob != blobs.digest(blob):
        raise RefusedError(f"the message's blob ({len(blob):,} bytes) is truncated or altered: its digest differs")
    return parsed.message(blobs.read(blob))


def vectors_of(message: Message) -> dict[str, Tensor]:
    """The message's vectors by their names in its blob; an encoded one has `NAME/PART` for each part."""
    if not isinstance(message, _CARRIERS):
        return {}
    found: dict[str, Tensor] = {}
    for name, vector in sorted(message.vectors.items(), key=lambda item: (item[0].startswith(AUXILIARY), item[0])):
        if isinstance(vector, Encoded):
            found |= {f"{name}/{part}": tensor for part, tensor in sorted(vector.parts.items())}
        else:
            found[name] = vector
    return found


def _plain_fields(message: Message) -> dict[str, Any]:
    """The message's fields without its vectors; for an encoded one, its codec, size and names of parts."""
    fields = {field.name: _plain(getattr(message, field.name)) for field in dataclasses.fields(message)}
    if isinstance(message, _CARRIERS):
        fields["vectors"] = {
            name: {"codec": vector.codec, "size": vector.size, "parts": sorted(vector.parts)}
            for name, vector in sorted(message.vectors.items())
            if isinstance(vector, Encoded)
        }
    return fields


def _plain(value: Any) -> Any:
    match value:
        case Tensor() | Encoded():
            return None  # in the blob
        case Mapping():
            return {name: _plain(item) for name, item in sorted(value.items())}
        case tuple():
            return [_plain(item) for item in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _join_vectors(outlines: Any, vectors: dict[str, Tensor], main: str) -> dict[str, Vector]:
    """Combine the header's outlines with their parts from the blob, and add the plain vectors.

    Removes the vectors used from `vectors`.
    """
    if not isinstance(outlines, dict):
        raise RefusedError("the header does not outline the message's vectors")
    joined: dict[str, Vector] = {name: _encoded(name, outline, vectors) for name, outline in outlines.items()}
    for name in [name for name in vectors if main and (name == main or name.startswith(AUXILIARY))]:
        vector = vectors.pop(name)
        if name in joined:
            raise RefusedError(f"vector {_short(name)!r} is there twice, plain and encoded")
        if vector.dtype != torch.float32 and not (vector.dtype == torch.float64 and name.startswith(AUXILIARY)):
            raise RefusedError(f"vector {_short(name)!r} is {vector.dtype}, not a float32 vector")
        joined[name] = vector
    return joined


def _encoded(name: str, outline: Any, vectors: dict[str, Tensor]) -> Encoded:
    match outline:
        case {"codec": str(codec), "size": int(size), "parts": list(parts), **rest} if not rest:
            if type(size) is bool or not 0 <= size <= MAX_ENCODED or not all(isinstance(part, str) for part in parts):
                raise RefusedError(f"vector {_short(name)!r} is not outlined as an encoded one")
            missing = [part for part in parts if f"{name}/{part}" not in vectors]
            if missing or len(set(parts)) != len(parts):
                raise RefusedError(f"vector {_short(name)!r} comes without its parts {_listed(missing or parts)}")
            return Encoded(codec=codec, size=size, parts={part: vectors.pop(f"{name}/{part}") for part in parts})
    raise RefusedError(f"the header does not say which codec, size and parts vector {_short(name)!r} has")


def _short(text: str) -> str:
    """A peer's text, short enough for a reason."""
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"


def _listed(names: Iterable[str]) -> str:
    return _short(", ".join(sorted(names)))


def _load(header: str, most: int) -> dict[str, Any]:
    size = len(header.encode(errors="replace"))
    if size > most:
        raise RefusedError(f"the message's header is {counted(size, 'byte')} long; {most:,} is the most")
    try:
        fields = json.loads(header, parse_int=_int64)
        if "\\u" in header:  # JSON can escape half a surrogate pair, which can be neither sent nor stored
            json.dumps(fields, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise RefusedError("the message's header is not JSON as we write it: it is truncated, or not ours") from None
    if not isinstance(fields, dict):
        raise RefusedError("the message's header is not a JSON object")
    return fields


def _int64(digits: str) -> int:
    """An integer that databases and other programs can hold."""
    value = int(digits)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{digits} needs more than 64 bits")
    return value
