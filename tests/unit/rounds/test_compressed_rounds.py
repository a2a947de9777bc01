"""Rounds whose vectors travel compressed: what arrives is what was meant, whatever gets lost on the way."""

import dataclasses
import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedshelf.algorithms.fedavg import FedAvg
from fedshelf.compression.chain import decode, parse
from fedshelf.compression.codec_policy import CodecPolicy
from fedshelf.compression.codec_stage import Encode
from fedshelf.compression.download import MemoryHeldModel, name_of
from fedshelf.core.encoded import Encoded
from fedshelf.core.events import ClientStatus, RunStatus
from fedshelf.core.messages import (
    Broadcast,
    Failure,
    ModelDelta,
    Purpose,
    ServerMessage,
    TaskKey,
    Upload,
)
from fedshelf.core.state import ClientState
from fedshelf.rounds.pipeline import UploadPipeline
from fedshelf.serialization import messages as payload
from fedshelf.training.trainer import Trainer
from tests.fakes import Answer
from tests.worlds import World, bound_model, linear, with_batch_norm

LOSSY = ("int8", "int4+zstd", "topk:0.2+int8", "randk:0.3", "drive", "fp16", "bf16+zstd")


def encoding(policy: CodecPolicy) -> UploadPipeline:
    return UploadPipeline(stages=() if policy.is_plain else (Encode(policy=policy),))


def world(*, up: str = "none", down: str = "none", **changes: Any) -> World:
    plan = {
        "uploads": encoding(CodecPolicy(codec=parse(up))),
        "downloads": CodecPolicy(codec=parse(down)),
    }
    return World(**{"plan": {**plan, **changes.pop("plan", {})}, "num_rounds": 4, **changes})


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("module", [linear, with_batch_norm])
def test_every_client_trains_on_the_model_that_the_server_keeps(codec: str, module: Any) -> None:
    there = world(up=codec, down=codec, module=module)
    assert there.run() is RunStatus.FINISHED
    for name in there.names:
        held = there.held[name].load()
        assert held is not None
        assert held[0] == name_of(there.final)
        assert torch.equal(held[1], there.final), "which it had to evaluate last"


@pytest.mark.parametrize("codec", LOSSY)
def test_the_model_that_is_sent_follows_the_exact_one(codec: str) -> None:
    """What a step leaves out is less than the step, and none of it is lost: it never adds up."""
    there = world(down=codec, num_rounds=8, module=with_batch_norm)
    there.run()
    states = there.checkpoints.states
    for before, after in itertools.pairwise(states):
        assert after.model.sent is not None
        assert before.model.sent is not None
        wanted = after.model.params - before.model.sent
        assert 0 < (after.model.params - after.model.sent).norm() < wanted.norm()
    assert there.checkpoints.states[-1].model.sent is not None
    drift = (states[-1].model.params - states[0].model.params).norm()
    assert (states[-1].model.params - states[-1].model.published).norm() < drift


def test_clients_round_differently_and_choose_alike() -> None:
    """Rounding errors average out; sums of sparse codes need one choice of values."""
    layout = bound_model(linear()).params.layout
    upload = Upload(
        key=TaskKey(run_id="r", round=1, attempt=0),
        vectors={"delta": torch.randn(layout.num_shared)},
        num_examples=1,
        num_steps=1,
        train_loss=0.0,
        seconds=0.0,
    )
    for codec, alike in (("int8", False), ("randk:0.3", True)):
        pipeline = encoding(CodecPolicy(codec=parse(codec)))
        decoded = []
        for client in ("a", "b"):
            sealed, _ = pipeline.seal(upload, client=client, before=ClientState(), after=ClientState(), layout=layout)
            decoded.append(pipeline.open(sealed, layout).delta)
        assert torch.equal(*decoded) == alike


@pytest.mark.parametrize("module", [linear, with_batch_norm])
def test_lossless_uploads_change_nothing(module: Any) -> None:
    plain, packed = world(module=module), world(up="zstd", module=module)
    assert plain.run() is packed.run() is RunStatus.FINISHED
    if module is linear:  # statistics are rounded to bfloat16 beside any codec
        assert torch.equal(plain.final, packed.final)
    assert (plain.final - packed.final).abs().max() < 1e-2


def test_after_the_first_round_a_client_is_sent_differences_only() -> None:
    there = world(down="int8")
    there.run()
    for name in there.names:
        tasks = there.transport.downloads(f"line-to-{name}")
        assert [[delta.base == "" for delta in task.deltas] for task in tasks[:3]] == [[True], [False], []]
        assert all(task.purpose is Purpose.EVALUATE for task in tasks[1::2]), "the new model comes to be evaluated,"
        assert all(not task.deltas for task in tasks[2::2]), "and is not sent again to be trained on"


def test_a_client_that_missed_rounds_is_sent_the_steps_between() -> None:
    there = world(down="topk:0.2", num_rounds=8, plan={"fraction": 0.3})
    assert there.run() is RunStatus.FINISHED
    several = [len(task.deltas) for name in there.names for task in there.transport.downloads(f"line-to-{name}")]
    assert max(several) > 1, "nobody missed a round: the test tests nothing"


def test_differences_that_are_larger_than_the_model_are_not_sent() -> None:
    there = world(down="fp16", num_rounds=9, plan={"fraction": 0.3})
    there.run()
    size = 4 * there.trainer("a").bound_model.params.layout.num_shared
    for name in there.names:
        for task in there.transport.downloads(f"line-to-{name}"):
            if [delta.base for delta in task.deltas] != [""]:
                assert sum(vector.num_bytes for vector in task.vectors.values() if isinstance(vector, Encoded)) < size


def test_a_client_that_lost_its_model_fails_once_and_is_then_sent_it_whole() -> None:
    there = world(down="int8", num_rounds=4)
    seen: list[ServerMessage] = []

    def forget(message: ServerMessage, honest: Answer) -> Answer:
        seen.append(message)
        if (
            isinstance(message, Broadcast)
            and not message.is_plain
            and message.key.round == 2
            and message.purpose is Purpose.TRAIN
        ):
            there.held["a"].__init__()  # type: ignore[misc]
        return honest

    there.tampers["a"] = forget
    assert there.run() is RunStatus.FINISHED
    statuses = [next(c.status for c in record.clients if c.client == "a") for record in there.finished]
    assert statuses.count(ClientStatus.COUNTED) >= 3
    whole = [
        m for m in seen if isinstance(m, Broadcast) and not m.is_plain and [delta.base for delta in m.deltas] == [""]
    ]
    assert len(whole) == 2


def test_a_restarted_server_and_client_go_on_with_the_same_bits() -> None:
    once = world(up="topk:0.2+int8", down="int4", num_rounds=5)
    once.run()
    again = world(up="topk:0.2+int8", down="int4", num_rounds=2)
    again.run()
    again.clients["b"] = again.client("b")
    again.restart()
    again.run_connected(num_rounds=5)
    assert torch.equal(once.final, again.final)
    assert torch.equal(once.checkpoints.states[-1].model.params, again.checkpoints.states[-1].model.params)


@dataclass(frozen=True)
class Noting(FedAvg):
    """FedAvg that notes what its clients change, before any codec."""

    deltas: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def client_round(self, broadcast: Broadcast, state: ClientState, trainer: Trainer) -> tuple[Upload, ClientState]:
        upload, _ = super().client_round(broadcast, state, trainer)
        self.deltas[trainer.client, broadcast.key.round] = upload.delta
        return upload, ClientState(algorithm={"of its own": upload.delta})


@pytest.mark.parametrize("lost", [None, 2])
def test_what_the_codec_leaves_out_is_sent_later_and_forgotten_with_an_upload_that_does_not_count(
    lost: int | None,
) -> None:
    """Over the counted rounds, what was sent and what is still remembered add up to what was trained."""
    algorithm = Noting()
    there = world(up="topk:0.1", num_rounds=4, algorithm=algorithm)
    sent: dict[int, Tensor] = {}

    def watch(message: ServerMessage, honest: Answer) -> Answer:
        if not isinstance(honest, Upload):
            return honest
        if honest.key.round == lost:
            return None
        sent[honest.key.round] = decode(encoded(honest, "trainable"))
        return honest

    there.tampers["a"] = watch
    there.run()
    assert sorted(sent) == [number for number in (1, 2, 3, 4) if number != lost]
    last = there.transport.broadcasts("line-to-a")[-1]
    after = replace(last, key=replace(last.key, round=9), counted=replace(last.key, round=4))
    kept = there.states["a"].commit_or_rollback(after)
    assert torch.equal(kept.algorithm["of its own"], algorithm.deltas["a", 4]), "an algorithm's state is its own"
    remembered = kept.pipeline["codec"]
    trained = sum(algorithm.deltas["a", number] for number in sent)
    assert remembered.abs().max() > 0
    torch.testing.assert_close(sum(sent.values()) + remembered, trained, rtol=0, atol=1e-6)


def encoded(upload: Upload, name: str) -> Encoded:
    vector = upload.vectors[name]
    assert isinstance(vector, Encoded)
    return vector


def compressed(message: ServerMessage, honest: Answer) -> Upload | None:
    return honest if isinstance(honest, Upload) and not honest.is_plain else None


def _with(honest: Upload, name: str, **changes: Any) -> Upload:
    return replace(honest, vectors={**honest.vectors, name: replace(encoded(honest, name), **changes)})


@pytest.mark.parametrize(
    ("what", "why"),
    [
        (lambda u: _with(u, "trainable", codec="int4"), "codec"),
        (lambda u: _with(u, "trainable", codec="no codec at all"), "codec"),
        (lambda u: _with(u, "trainable", size=7), "7 values"),
        (lambda u: _with(u, "trainable", parts={}), "trainable"),
        (lambda u: replace(u, vectors={}), "trainable"),
        (lambda u: replace(u, vectors={**u.vectors, "photo": u.vectors["trainable"]}), "photo"),
        (lambda u: replace(u, vectors={**u.vectors, "auxiliary.x": parse("bf16").encode(torch.ones(3), seed=0)}), "x"),
        (
            lambda u: Upload(
                key=u.key, vectors={"delta": torch.zeros(147)}, num_examples=1, num_steps=1, train_loss=0.0, seconds=0.0
            ),
            "compressed",
        ),
    ],
)
def test_an_upload_that_is_not_as_the_run_wants_it_is_refused_by_name(what: Any, why: str) -> None:
    there = world(up="int8", num_rounds=1)
    there.tampers["b"] = lambda message, honest: what(honest) if compressed(message, honest) else honest
    assert there.run() is RunStatus.FINISHED
    members = {member.client: member for member in there.finished[0].clients}
    assert members["b"].status is ClientStatus.REFUSED
    assert why in members["b"].reason
    assert members["a"].status is members["c"].status is ClientStatus.COUNTED


def test_a_compressed_upload_where_none_is_wanted_is_refused() -> None:
    there = world(num_rounds=1)

    def compress(message: ServerMessage, honest: Answer) -> Answer:
        if not isinstance(honest, Upload):
            return honest
        plain = {
            field.name: getattr(honest, field.name) for field in dataclasses.fields(Upload) if field.name != "vectors"
        }
        return Upload(**plain, vectors={"trainable": parse("int8").encode(honest.delta, seed=0)})

    there.tampers["c"] = compress
    there.run()
    assert {m.client: m.status for m in there.finished[0].clients}["c"] is ClientStatus.REFUSED


def test_a_client_refuses_a_difference_that_leads_elsewhere() -> None:
    there = world(down="int8", num_rounds=1)
    there.run()
    client, task = there.clients["a"], there.transport.downloads("line-to-a")[0]
    key = TaskKey(run_id="run-1", round=9, attempt=0)
    wrong = client.handle(replace(task, key=key, model="another"))
    assert isinstance(wrong, Failure)
    assert "decoded model" in wrong.reason
    stranger = ModelDelta(base="unheard of", model="another")
    lost = client.handle(replace(task, key=key, model="another", deltas=(stranger,)))
    assert isinstance(lost, Failure)
    assert "does not hold" in lost.reason
    whole, part = ModelDelta(base="", model="x"), {"0/trainable": task.vectors["0/trainable"]}
    assert isinstance(client.handle(replace(task, key=key, model="x", deltas=(whole,), vectors=part)), Failure)


@pytest.mark.parametrize("codec", ["int4+zstd", "drive", "topk:0.1+int8+zstd"])
def test_bytes_are_counted_as_they_travel_and_are_fewer(codec: str) -> None:
    plain, packed = world(module=with_batch_norm), world(up=codec, down=codec, module=with_batch_norm)
    plain.run()
    packed.run()
    for record, other in zip(plain.finished[1:], packed.finished[1:], strict=True):
        assert other.bytes_up < record.bytes_up
    down = sum(sum(payload.size(m)) for _, m in packed.transport.sent if isinstance(m, Broadcast) and not m.is_plain)
    assert down == sum(record.bytes_down for record in packed.finished)


def test_a_byte_budget_is_never_exceeded() -> None:
    budget = 3000
    plan = {
        "uploads": encoding(CodecPolicy(byte_budget=budget)),
        "downloads": CodecPolicy(byte_budget=budget),
    }
    there = world(module=with_batch_norm, plan=plan)
    uploads: list[Upload] = []

    def watch(message: ServerMessage, honest: Answer) -> Answer:
        uploads.extend([honest] if isinstance(honest, Upload) and not honest.is_plain else [])
        return honest

    there.tampers = dict.fromkeys(there.names, watch)
    assert there.run() is RunStatus.FINISHED
    sizes = [sum(payload.size(upload)) for upload in uploads]
    assert len(sizes) == 4 * len(there.names)
    assert max(sizes) <= budget
    assert min(sizes) > budget / 2, "it is there to be used"
    tasks = [task for name in there.names for task in there.transport.downloads(f"line-to-{name}")]
    later = [task for task in tasks if [delta.base for delta in task.deltas] != [""]]
    assert later
    assert all(sum(payload.size(task)) <= budget * max(1, len(task.deltas)) for task in later)


def test_encoded_vectors_survive_the_wire_to_the_last_bit() -> None:
    key = TaskKey(run_id="run-1", round=1, attempt=0)
    vector = Encoded(
        codec="odd", size=9,
        parts={
            "b": torch.arange(3, dtype=torch.uint8), "a": torch.randn(5).to(torch.bfloat16), "c": torch.ones(2).half(),
        },
    )  # fmt: skip
    sent = Upload(
        key=key, vectors={"trainable": vector, "é": vector}, num_examples=1, num_steps=1, train_loss=0.5, seconds=1.0
    )  # fmt: skip
    body = payload.blob_of(sent)
    received = payload.decode(payload.encode_header(sent, body.digest), body.join())
    assert isinstance(received, Upload)
    for name in sent.vectors:
        found = encoded(received, name)
        assert (found.codec, found.size) == ("odd", 9)
        assert all(torch.equal(part, vector.parts[p]) for p, part in found.parts.items())


def test_a_model_kept_by_a_client_is_named_when_it_comes_back() -> None:
    held = MemoryHeldModel()
    model = torch.randn(5)
    held.save(name_of(model), model)
    assert held.load() == (name_of(model), model)
