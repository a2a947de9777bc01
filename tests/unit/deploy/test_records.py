"""Messages as Flower records."""

import json

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedshelf.compression.download import name_of
from fedshelf.core.errors import RefusedError
from fedshelf.core.messages import (
    Broadcast,
    ClassFolder,
    Evaluation,
    Failure,
    Join,
    Purpose,
    Ready,
    Setup,
    TaskKey,
    Upload,
    auxiliary_vectors,
)
from fedshelf.deploy.records import (
    Control,
    ControlKind,
    Encoder,
    Envelope,
    WireMessage,
    num_bytes,
    open_records,
    to_parcel,
)
from tests.unit.deploy.echo import read_records

KEY = TaskKey(run_id="r", round=3, attempt=1)


def upload() -> Upload:
    return Upload(
        key=KEY,
        vectors={"delta": torch.randn(1000), **auxiliary_vectors({"control": torch.randn(10)})},
        num_examples=7,
        num_steps=2,
        train_loss=0.5,
        seconds=1.5,
    )


def broadcast(params: torch.Tensor) -> Broadcast:
    return Broadcast(key=KEY, purpose=Purpose.TRAIN, vectors={"params": params}, client_lr=0.1, counted=KEY)


@pytest.mark.parametrize(
    "message",
    [
        Join(protocol=1, version="0.1.0", client="lyon", classes=(ClassFolder(leaf="a", path="b/a"),)),
        Setup(run_id="r", config="a = 1", catalogue="{}", layout_digest="d"),
        Ready(
            run_id="r", layout_digest="l", catalogue_digest="c", config_digest="d", num_train=1, num_validation=2,
            num_left_out=3,
        ),
        Evaluation(key=KEY, num_examples=10, num_correct=5, loss_sum=2.25),
        Failure(reason="the disk is full", key=KEY),
        Failure(reason="the disk is full"),
        Control(kind=ControlKind.REFUSED, reason="the name 'lyon' is taken"),
    ],
)  # fmt: skip
def test_a_message_without_vectors_survives_the_wire(message: WireMessage) -> None:
    assert read_records(to_parcel(message).records) == message


@pytest.mark.parametrize("beside", [False, True])
def test_vectors_survive_the_wire_bit_for_bit(beside: bool) -> None:
    sent = upload()
    sent.delta[:3] = torch.tensor([float("nan"), -0.0, 1e-45])
    parcel = to_parcel(sent)
    received = read_records(parcel.records, parcel.blob.join()) if beside else read_records(parcel.inline())
    assert isinstance(received, Upload)
    assert received.delta.numpy().tobytes() == sent.delta.numpy().tobytes()
    assert torch.equal(received.auxiliary["control"], sent.auxiliary["control"])
    assert (received.key, received.num_examples, received.train_loss) == (KEY, 7, 0.5)


def test_the_frozen_part_of_a_model_comes_with_the_setup() -> None:
    frozen = torch.randn(1000)
    setup = Setup(
        run_id="r", config="", catalogue="", layout_digest="", frozen=name_of(frozen), vectors={"frozen": frozen}
    )  # fmt: skip
    parcel = to_parcel(setup)
    received = read_records(parcel.records, parcel.blob.join())
    assert received == setup
    assert isinstance(received, Setup)
    assert received.frozen_values is not None
    assert torch.equal(received.frozen_values, frozen)


@pytest.mark.parametrize(
    ("frozen", "vectors"),
    [
        ("", {"frozen": torch.zeros(3)}), ("digest", {}), ("digest", {"params": torch.zeros(3)}),
        ("digest", {"frozen": torch.zeros(3), "auxiliary.more": torch.zeros(3)}),
    ],
)  # fmt: skip
def test_a_setup_with_other_vectors_than_it_names_is_refused(frozen: str, vectors: dict[str, torch.Tensor]) -> None:
    setup = Setup(run_id="r", config="", catalogue="", layout_digest="", frozen=frozen, vectors=vectors)
    parcel = to_parcel(setup)
    with pytest.raises(RefusedError, match=r"setup (does not hold|may not carry)"):
        read_records(parcel.records, parcel.blob.join())


def test_one_model_is_encoded_once_for_all_clients() -> None:
    encoder, params = Encoder(), torch.randn(1000)
    first = encoder.encode(broadcast(params))
    encoder.encode(Setup(run_id="r", config="", catalogue="", layout_digest=""))
    second = encoder.encode(broadcast(params))
    assert first.blob is second.blob
    assert first.inline()["blob"] is second.inline()["blob"]


def test_two_models_of_one_task_are_both_encoded_once() -> None:
    encoder, old, new = Encoder(), torch.randn(1000), torch.randn(1000)
    first, second = (encoder.encode(broadcast(params)).blob for params in (old, new))
    assert encoder.encode(broadcast(old)).blob is first
    assert encoder.encode(broadcast(new)).blob is second


def test_a_blob_lies_in_the_vectors_own_memory() -> None:
    params = torch.randn(1000)
    piece = Encoder().encode(broadcast(params)).blob.pieces[-1]
    assert torch.frombuffer(piece, dtype=torch.float32).data_ptr() == params.data_ptr()


def envelope(records: RecordDict) -> Envelope:
    opened = open_records(records)
    assert isinstance(opened, Envelope)
    return opened


def test_records_without_their_blob_say_which_one_and_what_task() -> None:
    parcel = to_parcel(upload())
    beside, inside = envelope(parcel.records), envelope(parcel.inline())
    assert beside.external_blob == parcel.blob.digest
    assert inside.external_blob == ""
    assert beside.header.task == KEY
    assert envelope(to_parcel(Failure(reason="x")).records).header.task is None


def test_a_model_changed_in_place_is_encoded_anew() -> None:
    encoder, params = Encoder(), torch.randn(1000)
    encoder.encode(broadcast(params))
    params[5:6].add_(1)  # through a view, as an optimizer does
    received = read_records(encoder.encode(broadcast(params)).inline())
    assert isinstance(received, Broadcast)
    assert torch.equal(received.params, params)


def test_a_model_made_in_inference_mode_is_never_mistaken_for_an_older_one() -> None:
    encoder = Encoder()
    with torch.inference_mode():
        params = torch.ones(10)
        encoder.encode(broadcast(params))
        params.add_(1)
        received = read_records(encoder.encode(broadcast(params)).inline())
    assert isinstance(received, Broadcast)
    assert torch.equal(received.params, torch.full((10,), 2.0))


def test_sizes_on_the_wire_are_header_and_blob() -> None:
    parcel = Encoder().encode(broadcast(torch.randn(1000)))
    assert num_bytes(parcel.inline()) == parcel.num_header_bytes + parcel.blob.size
    assert parcel.blob.size > 4000
    assert len(parcel.blob.digest) == 64


def array(data: bytes, stype: str = "fedshelf.safetensors") -> ArrayRecord:
    return ArrayRecord({"safetensors": Array(dtype="uint8", shape=(len(data),), stype=stype, data=data)})


def header(fields: dict[str, object]) -> ConfigRecord:
    return ConfigRecord({"json": json.dumps(fields)})


def test_a_truncated_blob_is_refused() -> None:
    records = to_parcel(upload()).inline()
    body = records["blob"]
    assert isinstance(body, ArrayRecord)
    records["blob"] = array(body["safetensors"].data[:-4])
    with pytest.raises(RefusedError, match="truncated or altered"):
        read_records(records)


def test_an_altered_vector_is_refused() -> None:
    records = to_parcel(upload()).inline()
    body = records["blob"]
    assert isinstance(body, ArrayRecord)
    data = bytearray(body["safetensors"].data)
    data[-1] ^= 1
    records["blob"] = array(bytes(data))
    with pytest.raises(RefusedError, match="truncated or altered"):
        read_records(records)


@pytest.mark.parametrize(
    ("records", "complaint"),
    [
        (RecordDict(), "not a header and a blob"),
        (RecordDict({"blob": array(b"x")}), "not a header and a blob"),
        (RecordDict({"header": MetricRecord({"json": 1.0})}), "not one text"),
        (RecordDict({"header": ConfigRecord({"json": b"{}"})}), "not one text"),
        (RecordDict({"header": ConfigRecord({"json": "{}", "photo": "x"})}), "not one text"),
        (RecordDict({"header": ConfigRecord({"json": "{"})}), "not JSON"),
        (RecordDict({"header": header({"kind": "photo", "blob": ""})}), "kind is unknown"),
        (RecordDict({"header": header({"kind": "failure", "reason": "x", "blob": "", "photo": 1})}), "photo"),
        (RecordDict({"header": ConfigRecord({"json": "{}"}), "photo": array(b"x")}), "photo"),
        (RecordDict({"header": ConfigRecord({"json": "{}"}), "blob": array(b"x", "pickle")}), "announced as"),
        (RecordDict({"header": ConfigRecord({"json": "{}"}), "blob": ConfigRecord()}), "not one array"),
        (RecordDict({"control": ConfigRecord({"kind": "format-disk", "reason": ""})}), "kind is unknown"),
        (RecordDict({"control": ConfigRecord({"kind": "closed", "reason": "", "x": 1})}), "exactly"),
        (RecordDict({"control": MetricRecord({"kind": 1})}), "exactly"),
    ],
)
def test_what_is_not_declared_is_refused_and_named(records: RecordDict, complaint: str) -> None:
    with pytest.raises(RefusedError, match=complaint):
        read_records(records)
