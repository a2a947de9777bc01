"""Messages as bytes: a JSON header and a safetensors body.

The header holds the message's plain fields and the body's SHA-256; the body holds its vectors and nothing else, so
that one model has one body, whoever it is sent to. Nothing here can carry an object that is not declared in
`core.messages`: unknown kinds, fields and tensors are refused on both sides, and no pickle is ever read.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from fedshelf.core import messages
from fedshelf.core.errors import RefusedError
from fedshelf.core.messages import Broadcast, ClientMessage, ServerMessage, Upload

KINDS: Mapping[str, type[Any]] = {
    kind.__name__.lower(): kind
    for kind in (
        messages.Join, messages.Setup, messages.Ready, Broadcast, Upload, messages.Evaluation, messages.Failure
    )
}  # fmt: skip
for _checked in (*KINDS.values(), messages.TaskKey, messages.ClassFolder):
    # Pydantic reads a dataclass' rules from the class; core knows nothing of pydantic, so they are set here.
    setattr(_checked, "__pydantic_config__", ConfigDict(extra="forbid", arbitrary_types_allowed=True))  # noqa: B010
_ADAPTERS: Mapping[str, TypeAdapter[Any]] = {name: TypeAdapter(kind) for name, kind in KINDS.items()}
AUXILIARY = "auxiliary."
MAX_HEADER_BYTES = 64 << 20  # a join lists every class folder; nothing honest comes near this


def encode_body(message: ServerMessage | ClientMessage) -> bytes:
    """The message's vectors as one safetensors file; empty where it has none."""
    vectors = _vectors(message)
    if not vectors:
        return b""
    arrays = [tensor.detach().to("cpu", torch.float32).contiguous() for tensor in vectors.values()]
    return b"".join([_safetensors_header(vectors), *(memoryview(array.numpy().data).cast("B") for array in arrays)])


def encode_header(message: ServerMessage | ClientMessage, body_digest: str) -> str:
    """The message's plain fields as JSON, with its kind and `digest` of the body."""
    fields = {
        field.name: value if not dataclasses.is_dataclass(value) else dataclasses.asdict(value)  # type: ignore[arg-type]
        for field in dataclasses.fields(message)
        if field.name not in _vector_fields(type(message))
        for value in [getattr(message, field.name)]
    }
    if isinstance(message, messages.Join):
        fields["classes"] = [dataclasses.asdict(folder) for folder in message.classes]
    header = {"kind": type(message).__name__.lower(), "body": body_digest, **fields}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":"))
    return text.encode(errors="replace").decode()  # a file's name in a reason may hold bytes that are no text


def digest(body: bytes) -> str:
    """What `encode_header` takes: the body's SHA-256, or nothing for no body."""
    return hashlib.sha256(body).hexdigest() if body else ""


def size(message: ServerMessage | ClientMessage) -> tuple[int, int]:
    """Bytes of (header, body) without making the body."""
    vectors = _vectors(message)
    header = len(encode_header(message, "0" * 64 if vectors else "").encode())
    if not vectors:
        return header, 0
    return header, len(_safetensors_header(vectors)) + 4 * sum(v.numel() for v in vectors.values())


def decode(header: str, body: bytes) -> ServerMessage | ClientMessage:
    """Read a message back, checking everything that can be checked without knowing the model.

    Raises:
        RefusedError: naming what is wrong: not our format, truncated, unknown kind or field, or a value out of range.
    """
    fields = _parse_header(header)
    kind = KINDS.get(str(fields.pop("kind", "")))
    if kind is None:
        raise RefusedError("the message's kind is unknown: the other side runs another version")
    announced = fields.pop("body", None)
    if announced != digest(body):
        raise RefusedError(f"the message's body ({len(body):,} bytes) is truncated or altered: its digest differs")
    vectors = _read_vectors(body)
    if _vector_fields(kind):
        main = next(name for name in _vector_fields(kind) if name != "auxiliary")
        if not fields.keys().isdisjoint(_vector_fields(kind)):
            raise RefusedError(f"the {kind.__name__.lower()}'s header holds a vector, which belongs in the body")
        if main not in vectors:
            raise RefusedError(f"the {kind.__name__.lower()} holds no vector {main!r}")
        fields[main] = vectors.pop(main)
        fields["auxiliary"] = {
            name.removeprefix(AUXILIARY): vectors.pop(name) for name in list(vectors) if name.startswith(AUXILIARY)
        }
    if vectors:
        raise RefusedError(f"a {kind.__name__.lower()} may not carry {', '.join(sorted(vectors))}")
    try:
        message: ServerMessage | ClientMessage = _ADAPTERS[kind.__name__.lower()].validate_python(fields)
    except ValidationError as error:
        details = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise RefusedError(f"the {kind.__name__.lower()} is malformed: {details}") from None
    return message


def _vector_fields(kind: type[Any]) -> tuple[str, ...]:
    return {Broadcast: ("params", "auxiliary"), Upload: ("delta", "auxiliary")}.get(kind, ())


def _vectors(message: ServerMessage | ClientMessage) -> dict[str, Tensor]:
    if isinstance(message, Broadcast):
        main = {"params": message.params}
    elif isinstance(message, Upload):
        main = {"delta": message.delta}
    else:
        return {}
    return main | {AUXILIARY + name: vector for name, vector in sorted(message.auxiliary.items())}


def _safetensors_header(vectors: Mapping[str, Tensor]) -> bytes:
    """The format's header (8 bytes of length, JSON padded to 8): written here so that no vector is copied for it."""
    entries, offset = {}, 0
    for name, vector in vectors.items():
        end = offset + 4 * vector.numel()
        entries[name] = {"dtype": "F32", "shape": list(vector.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


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


def _read_vectors(body: bytes) -> dict[str, Tensor]:
    if not body:
        return {}
    try:
        vectors: dict[str, Tensor] = safetensors.torch.load(body)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise RefusedError(f"the message's body is not a safetensors file: {error}") from None
    for name, vector in vectors.items():
        if vector.dtype != torch.float32 or vector.dim() != 1:
            raise RefusedError(
                f"vector {name!r} is {vector.dtype} of shape {tuple(vector.shape)}, not a float32 vector"
            )
    return vectors
