"""Messages as a JSON header and a body of vectors.

The header holds the message's plain fields and the body's digest; the body (see `blob`) holds its vectors and nothing
else, so that one model has one body, whoever it is sent to. Nothing here can carry an object that is not declared in
`core.messages`: unknown kinds, fields and tensors are refused on both sides, and no pickle is ever read.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from fedshelf.core import messages
from fedshelf.core.encoded import Encoded
from fedshelf.core.errors import RefusedError
from fedshelf.core.messages import (
    AUXILIARY,
    Broadcast,
    ClientMessage,
    CompressedBroadcast,
    CompressedUpload,
    ServerMessage,
    Step,
    Upload,
)
from fedshelf.serialization import blob as blobs
from fedshelf.serialization.blob import Blob, Buffer

Message: TypeAlias = ServerMessage | ClientMessage

KINDS: Mapping[str, type[Any]] = {
    kind.__name__.lower(): kind
    for kind in (
        messages.Join, messages.Setup, messages.Ready, Broadcast, CompressedBroadcast, Upload, CompressedUpload,
        messages.Evaluation, messages.Comparison, messages.Failure,
    )
}  # fmt: skip
for _checked in (*KINDS.values(), messages.TaskKey, messages.ClassFolder, Step, Encoded):
    # Pydantic reads a dataclass' rules from the class; core knows nothing of pydantic, so they are set here.
    setattr(_checked, "__pydantic_config__", ConfigDict(extra="forbid", arbitrary_types_allowed=True))  # noqa: B010
_ADAPTERS: Mapping[str, TypeAdapter[Any]] = {name: TypeAdapter(kind) for name, kind in KINDS.items()}
MAX_HEADER_BYTES = 64 << 20  # a join lists every class folder; nothing honest comes near this


def blob_of(message: Message) -> Blob:
    """The message's vectors, ready to be sent: nothing is copied. No pieces where it has none."""
    return blobs.write(vectors_of(message))


def encode_blob(message: Message) -> bytes:
    """The message's body in one piece."""
    return blob_of(message).join()


def encode_header(message: Message, blob_digest: str) -> str:
    """The message's plain fields as JSON, with its kind and the `digest` of the body."""
    header = {"kind": type(message).__name__.lower(), "body": blob_digest, **_plain_fields(message)}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":"))
    return text.encode(errors="replace").decode()  # a file's name in a reason may hold bytes that are no text


def digest(blob: Buffer) -> str:
    """What `encode_header` takes: the body's name, or nothing for no body."""
    return blobs.digest(blob)


def size(message: Message) -> tuple[int, int]:
    """Bytes of (header, body) without making the body."""
    vectors = vectors_of(message)
    return len(encode_header(message, "0" * 64 if vectors else "").encode()), blobs.size_of(vectors)


def blob_digest(header: str) -> str:
    """The name of the body that belongs to `header`; "" where it has none.

    Raises:
        RefusedError: the header is not one of ours.
    """
    return _announced(_parse_header(header))


def decode(header: str, blob: Buffer, *, computed: str | None = None) -> Message:
    """Read a message back, checking everything that can be checked without knowing the model.

    Args:
        header: see `encode_header`.
        body: its vectors become views of it where it is writable memory.
        computed: the body's digest, where the caller has computed it while the bytes came in.

    Raises:
        RefusedError: naming what is wrong: not our format, truncated, unknown kind or field, or a value out of range.
    """
    fields = _parse_header(header)
    kind = _kind(fields)
    if _announced(fields) != (digest(blob) if computed is None else computed):
        raise RefusedError(f"the message's body ({len(blob):,} bytes) is truncated or altered: its digest differs")
    return _joined(kind, fields, blobs.read(blob))


def join(header: str, vectors: Mapping[str, Tensor]) -> Message:
    """The message of a header and its vectors by name; whether they belong together is the caller's to know.

    Raises:
        RefusedError: see `decode`.
    """
    fields = _parse_header(header)
    return _joined(_kind(fields), fields, vectors)


def _joined(kind: type[Any], fields: dict[str, Any], vectors: Mapping[str, Tensor]) -> Message:
    fields, rest = {name: value for name, value in fields.items() if name not in ("kind", "body")}, dict(vectors)
    name = kind.__name__.lower()
    if kind in (Broadcast, Upload):
        _fill_plain(fields, rest, "params" if kind is Broadcast else "delta", name)
    elif kind is CompressedUpload:
        fields["vectors"] = _filled(fields.get("vectors"), rest, "")
    elif kind is CompressedBroadcast:
        _fill_steps(fields, rest, name)
    if rest:
        raise RefusedError(f"a {name} may not carry {', '.join(sorted(rest))}")
    try:
        message: Message = _ADAPTERS[name].validate_python(fields)
    except ValidationError as error:
        details = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise RefusedError(f"the {name} is malformed: {details}") from None
    return message


def vectors_of(message: Message) -> dict[str, Tensor]:
    """The message's vectors by the names that they have in its body."""
    match message:
        case Broadcast(params=params, auxiliary=auxiliary):
            return {"params": params, **_named(auxiliary)}
        case Upload(delta=delta, auxiliary=auxiliary):
            return {"delta": delta, **_named(auxiliary)}
        case CompressedUpload(vectors=vectors):
            return _parts(vectors, "")
        case CompressedBroadcast(steps=steps, auxiliary=auxiliary):
            found = _named(auxiliary)
            for number, step in enumerate(steps):
                found |= _parts(step.vectors, f"{number}/")
            return found
    return {}


def _kind(fields: Mapping[str, Any]) -> type[Any]:
    kind = KINDS.get(str(fields.get("kind", "")))
    if kind is None:
        raise RefusedError("the message's kind is unknown: the other side runs another version")
    return kind


def _announced(fields: Mapping[str, Any]) -> str:
    announced = fields.get("body")
    if not isinstance(announced, str):
        raise RefusedError("the message's header does not say which body belongs to it")
    return announced


def _named(auxiliary: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {AUXILIARY + name: vector for name, vector in sorted(auxiliary.items())}


def _parts(vectors: Mapping[str, Encoded], prefix: str) -> dict[str, Tensor]:
    return {
        f"{prefix}{name}/{part}": tensor
        for name, encoded in sorted(vectors.items())
        for part, tensor in sorted(encoded.parts.items())
    }


def _plain_fields(message: Message) -> dict[str, Any]:
    """The message's fields without its vectors: of an encoded one the codec, the size and the names of its parts."""
    hidden = {Broadcast: ("params", "auxiliary"), Upload: ("delta", "auxiliary"), CompressedBroadcast: ("auxiliary",)}
    return {
        field.name: _plain(getattr(message, field.name))
        for field in dataclasses.fields(message)
        if field.name not in hidden.get(type(message), ())
    }


def _plain(value: Any) -> Any:
    match value:
        case Encoded():
            return {"codec": value.codec, "size": value.size, "parts": sorted(value.parts)}
        case Step():
            return {"base": value.base, "model": value.model, "vectors": _plain(value.vectors)}
        case Mapping():
            return {name: _plain(item) for name, item in sorted(value.items())}
        case tuple():
            return [_plain(item) for item in value]
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _fill_plain(fields: dict[str, Any], vectors: dict[str, Tensor], main: str, kind: str) -> None:
    if main in fields:
        raise RefusedError(f"the {kind}'s header holds a vector, which belongs in the body")
    if main not in vectors:
        raise RefusedError(f"the {kind} holds no vector {main!r}")
    fields[main] = _float32(main, vectors.pop(main))
    _fill_auxiliary(fields, vectors, kind)


def _fill_steps(fields: dict[str, Any], vectors: dict[str, Tensor], kind: str) -> None:
    steps = fields.get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise RefusedError(f"the {kind} does not list its steps")
    for number, step in enumerate(steps):
        step["vectors"] = _filled(step.get("vectors"), vectors, f"{number}/")
    _fill_auxiliary(fields, vectors, kind)


def _fill_auxiliary(fields: dict[str, Any], vectors: dict[str, Tensor], kind: str) -> None:
    if "auxiliary" in fields:
        raise RefusedError(f"the {kind}'s header holds a vector, which belongs in the body")
    fields["auxiliary"] = {
        name.removeprefix(AUXILIARY): _float32(name, vectors.pop(name))
        for name in list(vectors)
        if name.startswith(AUXILIARY)
    }


def _filled(outlines: Any, vectors: dict[str, Tensor], prefix: str) -> dict[str, Any]:
    """The encoded vectors that a header outlines, with their parts from the body."""
    match outlines:
        case dict():
            return {name: _with_parts(outline, vectors, f"{prefix}{name}") for name, outline in outlines.items()}
    raise RefusedError("the header does not outline the message's vectors")


def _with_parts(outline: Any, vectors: dict[str, Tensor], name: str) -> dict[str, Any]:
    match outline:
        case {"parts": list(parts)} if all(isinstance(part, str) for part in parts):
            missing = [part for part in parts if f"{name}/{part}" not in vectors]
            if missing or len(set(parts)) != len(parts):
                raise RefusedError(f"vector {name!r} comes without its parts {', '.join(missing) or parts}")
            return {**outline, "parts": {part: vectors.pop(f"{name}/{part}") for part in parts}}
    raise RefusedError(f"the header does not say which parts vector {name!r} has")


def _float32(name: str, vector: Tensor) -> Tensor:
    if vector.dtype != torch.float32:
        raise RefusedError(f"vector {name!r} is {vector.dtype}, not a float32 vector")
    return vector


def _parse_header(header: str) -> dict[str, Any]:
    if len(header) > MAX_HEADER_BYTES:
        raise RefusedError(f"the message's header is {len(header):,} characters long; {MAX_HEADER_BYTES:,} is the most")
    try:
        fields = json.loads(header, parse_int=_int64)
        if "\\u" in header:  # half a character can be escaped, but neither be sent on nor be written down
            json.dumps(fields, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise RefusedError("the message's header is not JSON as we write it: it is truncated, or not ours") from None
    if not isinstance(fields, dict):
        raise RefusedError("the message's header is not a JSON object")
    return fields


def _int64(digits: str) -> int:
    """A number that databases and other programs can hold."""
    value = int(digits)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{digits} needs more than 64 bits")
    return value
