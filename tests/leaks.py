"""What may leave a client, written down field by field; everything else is a leak.

This list is kept apart from the code on purpose: whoever adds a field to a message must come here and say so.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HEX = re.compile(r"[0-9a-f]{64}")
RUN_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{4}")
MAX_REASON = 500
CODEC = re.compile(r"[a-z0-9:.+]{1,40}")
_NAMES = (
    "values",
    "codes",
    "scales",
    "signs",
    "rotation_seed",
    "support_seed",
    "index_bitmap",
    "index_low",
    "index_high",
)
PARTS = frozenset((*_NAMES, *(f"{name}.zst" for name in _NAMES)))
LONGEST_WORD = 40  # of a reason: text has spaces, encoded bytes have none
MAX_COUNT = 1_000_000
CANDIDATES = frozenset(("local", "global", "personalized"))
WINDOW = 32  # bytes of a photo that must not occur anywhere
TAIL_BYTES = 8  # a safetensors file begins with its header's length

# Routes of the protocol, and the HTTP headers that Python's client sends.
ROUTES = frozenset(
    [f"POST /v1/fleet/{name}" for name in (
        "register-node", "activate-node", "deactivate-node", "unregister-node", "confirm-message-received",
    )] + ["GET /fedshelf/health", "GET /fedshelf/authority", "GET /fedshelf/roster", "POST /fedshelf/enroll",
       "POST /fedshelf/renew", "POST /fedshelf/wait", "POST /fedshelf/pull", "POST /fedshelf/push",
       "POST /fedshelf/died"]
)  # fmt: skip
BLOB_ROUTE = re.compile(r"(GET|HEAD|PUT) /fedshelf/blobs/[0-9a-f]{64}")
TOKEN = re.compile(r"[0-9a-f]{32}")
CRASH_REPORT = re.compile(rb'\{"token": "[0-9a-f]{32}", "signal": "(SIG(SEGV|BUS|ABRT|ILL|FPE))?"\}')
HTTP_HEADERS = frozenset(
    ("host", "accept-encoding", "content-length", "content-type", "content-range", "range", "upload-length")
)


@dataclass(frozen=True, kw_only=True)
class Store:
    """What a store agreed to tell, and what it did not: its photos."""

    name: str
    classes: frozenset[str]
    num_values: int  # of the model
    file_names: tuple[str, ...]


Check = Callable[[Any, Store], bool]


def _count(value: Any, store: Store) -> bool:
    return type(value) is int and 0 <= value <= MAX_COUNT


def _number(value: Any, store: Store) -> bool:
    return type(value) in (int, float)


def _mechanism(value: Any, store: Store) -> bool:
    """Three numbers about the noise, which follow from the configuration and the number of photos."""
    names = ("noise_multiplier", "sampling_rate", "steps")
    return value is None or (sorted(value) == sorted(names) and all(_number(value[name], store) for name in names))


def _or_withheld(check: Check) -> Check:
    """The value, or nothing where the store's policy withholds it."""
    return lambda value, store: value is None or check(value, store)


def _digest(value: Any, store: Store) -> bool:
    return isinstance(value, str) and HEX.fullmatch(value) is not None


def _accuracies(value: Any, store: Store) -> bool:
    """A share for each of the models that a store can choose among."""
    return (
        isinstance(value, dict)
        and set(value) <= CANDIDATES
        and all(type(share) is float and 0 <= share <= 1 for share in value.values())
    )


def _run_id(value: Any, store: Store) -> bool:
    return isinstance(value, str) and RUN_ID.fullmatch(value) is not None


def _key(value: Any, store: Store) -> bool:
    return isinstance(value, dict) and not _unlisted(
        value, {"run_id": _run_id, "round": _count, "attempt": _count}, store
    )


def _scores(value: Any, store: Store) -> bool:
    return isinstance(value, list) and all(
        isinstance(score, dict) and set(score) == {"num_correct", "losses"} and _count(score["num_correct"], store)
        and all(_number(loss, store) for loss in score["losses"])
        for score in value
    )  # fmt: skip


def _classes(value: Any, store: Store) -> bool:
    return isinstance(value, list) and all(
        isinstance(folder, dict) and set(folder) == {"leaf", "path"} and set(folder.values()) <= store.classes
        for folder in value
    )


def _products(value: Any, store: Store) -> bool:
    """Two counts for each of the store's products, or nothing."""
    return (
        isinstance(value, list)
        and len(value) <= len(store.classes)
        and all(not _unlisted(entry, {"index": _count, "correct": _count, "total": _count}, store) for entry in value)
    )


def _levels(value: Any, store: Store) -> bool:
    """A count for each level of the folders above the products, or nothing."""
    depth = max(path.count("/") + 1 for path in store.classes)
    return isinstance(value, list) and len(value) <= depth and all(_count(entry, store) for entry in value)


def _encoded_vectors(value: Any, store: Store) -> bool:
    """Both segments of the model and nothing else, which together stand for as many values as the model has; none of a
    plain upload."""
    return value == {} or (
        isinstance(value, dict)
        and set(value) <= {"trainable", "statistics"}
        and sum(vector.get("size", 0) for vector in value.values()) == store.num_values
        and all(
            set(vector) == {"codec", "size", "parts"}
            and CODEC.fullmatch(vector["codec"]) is not None
            and set(vector["parts"]) <= PARTS
            for vector in value.values()
        )
    )


def _reason(value: Any, store: Store) -> bool:
    return (
        isinstance(value, str)
        and len(value) <= MAX_REASON
        and value.isprintable()
        and all(len(word) <= LONGEST_WORD for word in value.split())
        and "/" not in value
        and not any(name in value for name in store.file_names)
    )


MESSAGES: Mapping[str, Mapping[str, Check]] = {
    "join": {
        "blob": lambda value, store: value == "",
        "protocol": _count,
        "version": lambda value, store: re.fullmatch(r"\d+\.\d+\.\d+", str(value)) is not None,
        "client": lambda value, store: value == store.name,
        "classes": _classes,
        "withdraws": lambda value, store: isinstance(value, bool),
    },
    "ready": {
        "blob": lambda value, store: value == "",
        "run_id": _run_id,
        "layout_digest": _digest,
        "catalogue_digest": _digest,
        "config_digest": _digest,
        "num_train": _or_withheld(_count),
        "num_validation": _or_withheld(_count),
        "num_left_out": _or_withheld(_count),
        "holds": lambda value, store: value == "" or _digest(value, store),
    },
    "upload": {
        "blob": _digest, "key": _key, "vectors": _encoded_vectors, "num_examples": _or_withheld(_count),
        "num_steps": _or_withheld(_count), "train_loss": _or_withheld(_number), "seconds": _or_withheld(_number),
        "batch_size": _count, "client_lr": _number,
        "mechanism": _mechanism, "tag": lambda value, store: value == "",
    },
    "evaluation": {
        "blob": lambda value, store: value == "", "key": _key, "num_examples": _count, "num_correct": _count,
        "loss_sum": _or_withheld(_number), "products": _products, "levels": _levels, "candidates": _scores,
        "masked": lambda value, store: value == "",
    },
    "comparison": {
        "blob": lambda value, store: value == "", "key": _key, "best": lambda value, store: value in CANDIDATES,
        "accuracies": _accuracies, "on_test": lambda value, store: type(value) is bool,
        "num_validation": _or_withheld(_count),
    },
    "failure": {
        "blob": lambda value, store: value == "",
        "key": lambda value, store: value is None or _key(value, store),
        "reason": _reason, "will_repeat": lambda value, store: type(value) is bool,
        "refused": lambda value, store: type(value) is bool,
    },
}  # fmt: skip


def leaks(records: Mapping[str, Mapping[str, Any]], store: Store) -> list[str]:
    """What in one message, as it leaves the client before compression and encryption, is not on the list.

    Args:
        records: by record's name its fields; bytes for an array.
        store: whose message it is.
    """
    if set(records) == {"control"}:
        return [] if records["control"] == {"kind": "noted", "reason": ""} else [f"control {records['control']}"]
    found = [f"record {name!r}" for name in records if name not in ("header", "blob")]
    header = records.get("header", {})
    found += [f"field {name!r} beside the header" for name in header if name != "json"]
    try:
        fields = json.loads(header.get("json", ""))
        kind = fields.pop("kind")
        allowed = MESSAGES[kind]
    except (ValueError, KeyError, AttributeError):
        return [*found, "a header that is no message on the list"]
    found += _unlisted(fields, allowed, store)
    blob = records.get("blob", {})
    found += [f"array {name!r} beside the blob" for name in blob if name != "safetensors"]
    data = blob.get("safetensors", b"")
    if kind != "upload":
        return found + ["a blob"] * bool(data)
    return found + (_unlisted_parts(data, fields) if fields.get("vectors") else _unlisted_in_blob(data, store))


def _unlisted(fields: Mapping[str, Any], allowed: Mapping[str, Check], store: Store) -> list[str]:
    unknown = [f"field {name!r}" for name in fields if name not in allowed]
    return unknown + [
        f"the value of field {name!r}"
        for name in allowed
        if name not in fields or not allowed[name](fields[name], store)
    ]


def _unlisted_in_blob(data: bytes, store: Store) -> list[str]:
    """A plain upload's blob is one vector of the model's size: no other tensor, no metadata, nothing around it."""
    size = int.from_bytes(data[:TAIL_BYTES], "little")
    text = data[TAIL_BYTES : TAIL_BYTES + size]
    expected = {"delta": {"dtype": "F32", "shape": [store.num_values], "data_offsets": [0, 4 * store.num_values]}}
    found = []
    if json.loads(text) != expected:
        found.append(f"tensors {text[:200]!r}")
    if text != json.dumps(expected, separators=(",", ":")).encode().ljust(len(text)) or len(text) % 8 or size > 200:
        found.append("a blob's header that is written otherwise")
    if len(data) != TAIL_BYTES + size + 4 * store.num_values:
        found.append("bytes after the tensors")
    return found


def _unlisted_parts(data: bytes, fields: Mapping[str, Any]) -> list[str]:
    """A compressed upload's blob holds the parts that its header lists, one after the other and to the last byte."""
    size = int.from_bytes(data[:TAIL_BYTES], "little")
    entries = json.loads(data[TAIL_BYTES : TAIL_BYTES + size])
    listed = {f"{name}/{part}" for name, vector in fields["vectors"].items() for part in vector["parts"]}
    found = [f"tensor {name!r}" for name in entries.keys() ^ listed]
    ends = [entry["data_offsets"][1] for entry in entries.values()]
    if [entry["data_offsets"][0] for entry in entries.values()] != [0, *ends][: len(ends)]:
        found.append("gaps between tensors")
    if len(data) != TAIL_BYTES + size + max(ends, default=0):
        found.append("bytes after the tensors")
    return found


def unlisted_requests(stream: bytes) -> list[str]:
    """What in the bytes of one connection is no request on the list."""
    found, rest = [], stream
    while rest:
        head, _, rest = rest.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, _, path = first.removesuffix(" HTTP/1.1").partition(" ")
        if f"{method} {path}" not in ROUTES and not BLOB_ROUTE.fullmatch(f"{method} {path}"):
            found.append(f"request {first[:100]!r}")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        token = headers.pop("fedshelf-crash-token", "0" * 32)
        found += [] if TOKEN.fullmatch(token) else [f"crash token {token!r}"]
        found += [f"header {name!r}" for name in headers if not (name in HTTP_HEADERS or name.startswith("fedshelf-"))]
        size = int(headers.get("content-length", "0"))
        if path == "/fedshelf/died" and not CRASH_REPORT.fullmatch(rest[:size]):
            found.append(f"crash report {rest[:size]!r}")
        rest = rest[size:]
    return found


def photo_windows(photos: Sequence[Path], image_size: int) -> set[bytes]:
    """Every run of `WINDOW` bytes of the photos' files, their pixels, and their pixels as a model sees them; less
    the few runs that say nothing (all but constant)."""
    windows: set[bytes] = set()
    for path in photos:
        image = Image.open(path).convert("RGB")
        small = image.resize((image_size, image_size))
        floats = (np.asarray(small, dtype=np.float32) / 255).tobytes()
        for data in (path.read_bytes(), image.tobytes(), small.tobytes(), floats):
            runs = {data[start : start + WINDOW] for start in range(len(data) - WINDOW + 1)}
            windows |= {run for run in runs if len(set(run)) > 8}
    return windows


def bytes_of_photos(recorded: bytes, windows: set[bytes]) -> int:
    """How many places in `recorded` hold a run of some photo."""
    return sum(recorded[start : start + WINDOW] in windows for start in range(len(recorded) - WINDOW + 1))
