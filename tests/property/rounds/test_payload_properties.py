"""The wire: what is read is what was written, to the last bit, or nothing."""

import contextlib
import dataclasses
import io
import json
import math
import pickle
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedshelf.core.bounds import MAX_COUNT, MAX_FLOAT, MAX_ROUND
from fedshelf.core.encoded import Encoded
from fedshelf.core.errors import RefusedError
from fedshelf.core.messages import (
    Broadcast,
    ClassFolder,
    Evaluation,
    Failure,
    Join,
    ModelDelta,
    Purpose,
    Ready,
    Setup,
    TaskKey,
    Upload,
    auxiliary_vectors,
)
from fedshelf.serialization import blob as blobs
from fedshelf.serialization import messages as payload
from fedshelf.serialization.blob import DTYPES

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
COUNT, ROUND = st.integers(0, MAX_COUNT), st.integers(0, MAX_ROUND)
FIGURE, DURATION = st.floats(-MAX_FLOAT, MAX_FLOAT), st.floats(0, MAX_FLOAT)
KEYS = st.builds(TaskKey, run_id=TEXT, round=ROUND, attempt=ROUND)
BITS = st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=20)
VECTORS = BITS.map(
    lambda bits: torch.tensor(bits, dtype=torch.int32).view(torch.float32)
)  # any float, NaN payloads too
AUXILIARY = st.dictionaries(TEXT, VECTORS, max_size=3)
PARTS = st.builds(
    lambda raw, dtype: torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype),
    st.binary(min_size=8, max_size=40).map(lambda raw: raw[: len(raw) // 8 * 8]),
    st.sampled_from(list(DTYPES.values())),
)
NAMES = st.text("abcdefgh.:_é", max_size=8)
ENCODED = st.builds(Encoded, codec=TEXT, size=COUNT, parts=st.dictionaries(NAMES, PARTS, max_size=3))
DELTAS = st.lists(st.builds(ModelDelta, base=TEXT, model=TEXT), max_size=3).map(tuple)
ADDED = AUXILIARY.map(auxiliary_vectors)
MESSAGES = st.one_of(
    st.builds(
        Join, protocol=ROUND, version=TEXT, client=TEXT,
        classes=st.lists(st.builds(ClassFolder, leaf=TEXT, path=TEXT), max_size=3).map(tuple),
    ),
    st.builds(Setup, run_id=TEXT, config=TEXT, catalogue=TEXT, layout_digest=TEXT),
    st.builds(
        Setup, run_id=TEXT, config=TEXT, catalogue=TEXT, layout_digest=TEXT, frozen=TEXT.filter(bool),
        vectors=st.builds(lambda frozen: {"frozen": frozen}, VECTORS),
    ),
    st.builds(
        Ready, run_id=TEXT, layout_digest=TEXT, catalogue_digest=TEXT, config_digest=TEXT, num_train=COUNT,
        num_validation=COUNT, num_left_out=COUNT, holds=TEXT,
    ),
    st.builds(
        Broadcast, key=KEYS, purpose=st.sampled_from(Purpose), client_lr=DURATION, counted=st.none() | KEYS,
        vectors=st.builds(lambda params, added: {"params": params, **added}, VECTORS, ADDED),
    ),
    st.builds(
        Broadcast, key=KEYS, purpose=st.sampled_from(Purpose), client_lr=DURATION, counted=st.none() | KEYS,
        model=TEXT.filter(bool), deltas=DELTAS,
        vectors=st.builds(lambda one, other: {**one, **other}, st.dictionaries(NAMES, ENCODED, max_size=2), ADDED),
    ),
    st.builds(
        Upload, key=KEYS, num_examples=COUNT, num_steps=COUNT, train_loss=FIGURE, seconds=DURATION,
        vectors=st.builds(lambda delta, added: {"delta": delta, **added}, VECTORS, ADDED)
        | st.dictionaries(NAMES, ENCODED, min_size=1, max_size=3),
    ),
    st.builds(Evaluation, key=KEYS, num_examples=COUNT, num_correct=COUNT, loss_sum=FIGURE),
    st.builds(Failure, reason=TEXT, key=st.none() | KEYS),
)  # fmt: skip
KEY = TaskKey(run_id="run-1", round=2, attempt=0)
UPLOAD = Upload(
    key=KEY, num_examples=7, num_steps=3, train_loss=0.5, seconds=1.5,
    vectors={"delta": torch.tensor([1.0, -2.0, 3.5]), **auxiliary_vectors({"control": torch.tensor([4.0])})},
)  # fmt: skip


def encode(message: Any) -> tuple[str, bytes]:
    body = payload.blob_of(message).join()
    return payload.encode_header(message, blobs.digest(body)), body


def same(left: object, right: object) -> bool:
    """Equal to the last bit: NaN equals itself, 0.0 and -0.0 differ in vectors."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.dtype is right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))
    if isinstance(left, float) and isinstance(right, float) and math.isnan(left):
        return math.isnan(right)
    if dataclasses.is_dataclass(left):
        return type(left) is type(right) and all(
            same(getattr(left, field.name), getattr(right, field.name)) for field in dataclasses.fields(left)
        )
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, tuple) and isinstance(right, tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


@given(MESSAGES)
def test_what_is_decoded_is_what_was_encoded_bit_for_bit(message: Any) -> None:
    assert same(payload.decode(*encode(message)), message)


@given(MESSAGES)
def test_the_announced_size_is_the_real_one(message: Any) -> None:
    header, body = encode(message)
    assert payload.size(message) == (len(header.encode()), len(body))


@given(VECTORS, AUXILIARY)
def test_the_blob_is_a_file_that_the_safetensors_library_reads(delta: Tensor, auxiliary: dict[str, Tensor]) -> None:
    read = safetensors.torch.load(
        payload.blob_of(dataclasses.replace(UPLOAD, vectors={"delta": delta, **auxiliary_vectors(auxiliary)})).join()
    )
    assert same(read, {"delta": delta, **{f"auxiliary.{name}": vector for name, vector in auxiliary.items()}})


def test_one_model_has_one_blob_whoever_it_is_sent_to() -> None:
    params = torch.randn(5)
    bodies = {
        payload.blob_of(
            Broadcast(key=key, purpose=Purpose.TRAIN, vectors={"params": params}, client_lr=lr, counted=counted)
        ).join()
        for key, lr, counted in ((KEY, 0.1, None), (dataclasses.replace(KEY, round=9), 0.2, KEY))
    }
    assert len(bodies) == 1


def test_a_vector_that_is_a_strided_view_travels_as_its_values() -> None:
    message = dataclasses.replace(UPLOAD, vectors={"delta": torch.arange(10.0)[::2]})
    assert not message.delta.is_contiguous()
    decoded = payload.decode(*encode(message))
    assert isinstance(decoded, Upload)
    assert decoded.delta.tolist() == [0, 2, 4, 6, 8]


def test_truncation_at_every_byte_is_refused() -> None:
    header, body = encode(UPLOAD)
    for end in range(len(header)):
        with pytest.raises(RefusedError):
            payload.decode(header[:end], body)
    for end in range(len(body)):
        with pytest.raises(RefusedError, match="truncated or altered"):
            payload.decode(header, body[:end])


def test_truncation_is_refused_even_where_the_digest_was_made_to_match() -> None:
    _, body = encode(UPLOAD)
    for end in range(len(body)):
        with pytest.raises(RefusedError):
            payload.decode(payload.encode_header(UPLOAD, blobs.digest(body[:end])), body[:end])


def test_a_flipped_bit_anywhere_in_the_blob_is_refused() -> None:
    header, body = encode(UPLOAD)
    for bit in range(8 * len(body)):
        flipped = bytearray(body)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RefusedError):
            payload.decode(header, bytes(flipped))


def test_a_flipped_bit_with_a_matching_digest_is_refused_or_a_message_and_nothing_else() -> None:
    _, body = encode(UPLOAD)
    for bit in range(8 * len(body)):
        flipped = bytearray(body)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            decoded = payload.decode(payload.encode_header(UPLOAD, blobs.digest(bytes(flipped))), bytes(flipped))
        except RefusedError:
            continue
        assert isinstance(decoded, Upload)


@given(st.text(max_size=60), st.binary(max_size=40))
def test_any_text_and_bytes_are_refused_and_nothing_else(header: str, body: bytes) -> None:
    with pytest.raises(RefusedError):
        payload.decode(header, body)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
def test_a_header_with_any_one_field_replaced_is_refused_or_a_message_and_nothing_else(data: st.DataObject) -> None:
    header, body = encode(data.draw(MESSAGES))
    fields = json.loads(header)
    fields[data.draw(st.sampled_from(sorted(fields)))] = data.draw(JSON)
    with contextlib.suppress(RefusedError):
        payload.encode_header(payload.decode(json.dumps(fields), body), "")


@pytest.mark.parametrize("key", ["file_name", "photo", "kind2", "delta", "auxiliary", ""])
@pytest.mark.parametrize("where", ["message", "key"])
def test_an_undeclared_field_is_refused(key: str, where: str) -> None:
    header, body = encode(UPLOAD)
    fields = json.loads(header)
    (fields if where == "message" else fields["key"])[key] = "shelf.jpg"
    with pytest.raises(RefusedError):
        payload.decode(json.dumps(fields), body)


@pytest.mark.parametrize("field", ["key", "num_examples", "num_steps", "train_loss", "seconds"])
def test_a_missing_field_is_refused_by_name(field: str) -> None:
    header, body = encode(UPLOAD)
    fields = json.loads(header)
    del fields[field]
    with pytest.raises(RefusedError, match=field):
        payload.decode(json.dumps(fields), body)


NOT_COUNTS = ("9" * 400, "7", True, False, 7.0, -1, MAX_COUNT + 1, [7])
NOT_FIGURES = ("0.5", True, math.nan, math.inf, -math.inf, MAX_FLOAT * 1.001, [0.5])


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field in ("num_examples", "num_steps") for value in NOT_COUNTS]
    + [(field, value) for field in ("train_loss", "seconds") for value in NOT_FIGURES]
    + [("client_lr", "0.1"), ("batch_size", 1.5), ("seconds", -0.001), ("batch_size", "8"), ("client_lr", math.nan)],
)
def test_a_number_of_another_type_or_out_of_bounds_is_refused_by_name(field: str, value: object) -> None:
    header, body = encode(UPLOAD)
    with pytest.raises(RefusedError, match=field):
        payload.decode(json.dumps({**json.loads(header), field: value}), body)


@pytest.mark.parametrize("value", ["2", True, -1, MAX_ROUND + 1, 2.0, None])
@pytest.mark.parametrize("field", ["round", "attempt"])
def test_a_task_key_with_such_a_number_is_refused_and_names_no_task(field: str, value: object) -> None:
    header, body = encode(UPLOAD)
    fields = json.loads(header)
    fields["key"][field] = value
    with pytest.raises(RefusedError, match=field):
        payload.decode(json.dumps(fields), body)
    assert payload.Header.parse(json.dumps(fields)).task is None


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_a_truth_value_of_another_type_is_refused(value: object) -> None:
    fields = {"kind": "failure", "blob": "", "reason": "x", "key": None, "will_repeat": value}
    with pytest.raises(RefusedError, match="will_repeat"):
        payload.decode(json.dumps(fields), b"")


def test_the_reason_for_a_malformed_message_stays_short() -> None:
    """However many faults it has, and however long the names of its fields are."""
    classes = [{"leaf": 3, "path": "x"}] * 10_000
    join = {"kind": "join", "blob": "", "protocol": 4, "version": "", "client": "a", "identity": "", "classes": classes}
    with pytest.raises(RefusedError) as refused:
        payload.decode(json.dumps({**join, "x" * 1_000_000: 1}), b"")
    assert "more problems" in str(refused.value)
    assert len(str(refused.value)) < 1000


def test_a_header_above_a_clients_limit_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(RefusedError, match="4,194,305 bytes long; 4,194,304 is the most"):
        payload.Header.parse("[" * (payload.MAX_CLIENT_HEADER_BYTES + 1), most=payload.MAX_CLIENT_HEADER_BYTES)


def with_vectors(vectors: dict[str, Tensor], message: Any = UPLOAD) -> tuple[str, bytes]:
    body = safetensors.torch.save(vectors)
    return payload.encode_header(message, blobs.digest(body)), body


@pytest.mark.parametrize(
    ("vectors", "why"),
    [
        ({"delta": torch.ones(2), "photo": torch.ones(2)}, "photo"),
        ({"params": torch.ones(2)}, "delta"),
        ({"auxiliary.c": torch.ones(2)}, "delta"),
        ({"delta": torch.ones(2, dtype=torch.float64)}, "float64"),
        ({"delta": torch.ones(2, dtype=torch.uint8)}, "uint8"),
        ({"delta": torch.ones(2, 2)}, r"\(2, 2\)"),
        ({"delta": torch.ones(2), "auxiliary.c": torch.ones(1, 1)}, r"\(1, 1\)"),
        ({"delta": torch.tensor(1.0)}, r"\(\)"),
    ],
)
def test_vectors_that_are_not_declared_are_refused_by_name(vectors: dict[str, Tensor], why: str) -> None:
    with pytest.raises(RefusedError, match=why):
        payload.decode(*with_vectors(vectors))


def test_a_message_without_vectors_may_carry_none() -> None:
    with pytest.raises(RefusedError, match="photo"):
        payload.decode(*with_vectors({"photo": torch.ones(3)}, Failure(reason="x")))


def test_an_unknown_kind_is_refused() -> None:
    for kind in ("upload2", "", None, 3, "taskkey"):
        with pytest.raises(RefusedError, match="kind"):
            payload.decode(json.dumps({"kind": kind, "blob": ""}), b"")


def test_pickles_are_refused_and_not_run(tmp_path: Any) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(tmp_path / "exploded"), "w"))

    saved = io.BytesIO()
    torch.save({"delta": Bomb()}, saved)
    for body in (pickle.dumps(Bomb()), saved.getvalue()):
        with pytest.raises(RefusedError, match="safetensors"):
            payload.decode(payload.encode_header(UPLOAD, blobs.digest(body)), body)
    assert not (tmp_path / "exploded").exists()


def test_a_header_nested_too_deep_is_refused() -> None:
    with pytest.raises(RefusedError):
        payload.decode("[" * 200_000, b"")
    with pytest.raises(RefusedError):
        payload.decode('{"kind":' * 200_000, b"")


@pytest.mark.parametrize("half", ["\ud800", "lyon \udc41", "\udfff\ud800"])
def test_half_a_character_is_refused(half: str) -> None:
    """A lone surrogate can be written down nowhere: the run's database would fail on it."""
    header = json.dumps({"kind": "failure", "blob": "", "reason": half, "key": None})
    with pytest.raises(RefusedError):
        payload.decode(header, b"")
    whole = json.dumps({"kind": "failure", "blob": "", "reason": "🍎 é", "key": None})
    assert payload.decode(whole, b"") == Failure(reason="🍎 é"), "escapes as such are fine"


@pytest.mark.parametrize("field", ["num_train", "num_validation", "num_left_out"])
@pytest.mark.parametrize("value", [2**63, 10**40])
def test_a_number_that_no_database_holds_is_refused(field: str, value: int) -> None:
    ready: Any = Ready(
        run_id="r", layout_digest="", catalogue_digest="", config_digest="", num_train=1, num_validation=1,
        num_left_out=0,
    )  # fmt: skip
    with pytest.raises(RefusedError):
        payload.decode(payload.encode_header(dataclasses.replace(ready, **{field: value}), ""), b"")


def test_a_reason_that_names_a_file_of_undecodable_bytes_can_be_sent() -> None:
    sent = Failure(reason="photo 'caf\udce9.jpg' cannot be read")
    header, body = encode(sent)
    received = payload.decode(header.encode().decode(), body)
    assert isinstance(received, Failure)
    assert received.reason == "photo 'caf?.jpg' cannot be read"
    assert payload.size(sent) == (len(header.encode()), 0)
