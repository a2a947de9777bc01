"""Asynchronous rounds with a client that sends what it should not: versions are what they are without that."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedshelf.algorithms.base import Algorithm
from fedshelf.algorithms.fedasync import FedAsync
from fedshelf.algorithms.fedbuff import FedBuff
from fedshelf.core.events import ClientRefused, ClientStatus, Participation, RunStatus
from fedshelf.core.messages import Evaluation, Ready, ServerMessage, TaskKey, Upload, auxiliary_vectors
from fedshelf.core.ports import Reply
from tests.fakes import Answer, Garbled, Gone
from tests.worlds import World, with_batch_norm

DELAYS = {"a": 1.0, "b": 1.3, "c": 2.9}
ALGORITHMS: dict[str, Algorithm] = {
    "fedbuff": FedBuff(server_lr=1.0, buffer_size=3), "fedasync": FedAsync(alpha=0.6, rho=0.01),
}  # fmt: skip


def world(algorithm: str = "fedbuff", **settings: Any) -> World:
    num_rounds = 9 if algorithm == "fedbuff" else 27  # of an upload each
    given = {"num_rounds": num_rounds, "delays": dict(DELAYS), "module": with_batch_norm, "rounds": {"timeout": 1000.0}}
    return World(algorithm=ALGORITHMS[algorithm], **{**given, **settings})


def on_upload(change: Callable[[Upload], Answer]) -> Callable[[ServerMessage, Answer], Answer]:
    return lambda message, honest: change(honest) if isinstance(honest, Upload) else honest


def of_another(upload: Upload, **changes: Any) -> Upload:
    return replace(upload, key=replace(upload.key, **changes))


def with_bad_value(upload: Upload, value: float) -> Upload:
    delta = upload.delta.clone()
    delta[-1] = value
    return replace(upload, vectors={**upload.vectors, "delta": delta})


def members(federation: World, *, but: str = "") -> list[list[Participation]]:
    """Of each version, what is recorded of all clients but one; how long they really took is no matter."""
    return [[replace(m, seconds=None) for m in r.clients if m.client != but] for r in federation.finished]


REFUSED: dict[str, tuple[Callable[[Upload], Answer], str]] = {
    "not a number": (lambda u: with_bad_value(u, math.nan), "its delta holds nan in tensor"),
    "endless": (lambda u: with_bad_value(u, -math.inf), "its delta holds -inf in tensor"),
    "endless loss": (lambda u: replace(u, train_loss=math.inf), "its metrics are not finite"),
    "of a wrong shape": (
        lambda u: replace(u, vectors={**u.vectors, "delta": u.delta[:-1].clone()}),
        "its delta has shape",
    ),
    "empty": (lambda u: replace(u, vectors={**u.vectors, "delta": torch.zeros(0)}), "its delta has shape (0,)"),
    "with a vector that nobody asked for": (
        lambda u: replace(u, vectors={**u.vectors, **auxiliary_vectors({"control": torch.ones(3)})}),
        "carries the vectors ['control']",
    ),
    "of no examples": (lambda u: replace(u, num_examples=0), "it claims 0 examples"),
    "for a version long gone": (lambda u: of_another(u, round=0), "stale or of another run"),
    "for a version to come": (lambda u: of_another(u, round=u.key.round + 5), "stale or of another run"),
    "for a task that it never got": (lambda u: of_another(u, attempt=7), "stale or of another run"),
    "for another run": (lambda u: of_another(u, run_id="another"), "stale or of another run"),
    "unreadable": (lambda u: Garbled("the message is truncated"), "the message is truncated"),
    "an evaluation": (
        lambda u: Evaluation(key=u.key, num_examples=4, num_correct=4, loss_sum=0.1),
        "something else than an upload",
    ),
}


@pytest.fixture(scope="module")
def without() -> dict[str, World]:
    """Runs in which the client trains for ever."""
    found = {}
    for name in ALGORITHMS:
        found[name] = world(name, tampers={"c": on_upload(lambda upload: None)})
        assert found[name].run() is RunStatus.FINISHED
    return found


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("kind", REFUSED)
def test_versions_are_made_without_what_a_client_sends_wrongly(
    kind: str, algorithm: str, without: dict[str, World]
) -> None:
    change, why = REFUSED[kind]
    federation = world(algorithm, tampers={"c": on_upload(change)})
    assert federation.run() is RunStatus.FINISHED
    assert torch.equal(federation.final, without[algorithm].final)
    refused = [m for record in federation.finished for m in record.clients if m.client == "c"]
    assert {member.status for member in refused} == {ClientStatus.REFUSED}
    assert all(why in member.reason for member in refused)
    assert members(federation, but="c") == members(without[algorithm])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("later", [0.0, 0.5, 1.7, 3.5, 9.1])
def test_an_upload_that_comes_twice_counts_once(later: float, algorithm: str) -> None:
    """Whatever its client is at when it comes again: an evaluation of the version just made, of whose task the key is
    the same, its next training, or nothing."""

    def twice(upload: Upload) -> Answer:
        again = Reply(address="line-to-c", message=upload, num_bytes=10, task=upload.key)
        federation.transport.arrive(again, delay=DELAYS["c"] + later)
        return upload

    honest, federation = world(algorithm), world(algorithm, tampers={"c": on_upload(twice)})
    assert honest.run() is federation.run() is RunStatus.FINISHED
    assert members(federation) == members(honest)
    assert [record.accuracy for record in federation.finished] == [record.accuracy for record in honest.finished]
    assert torch.equal(federation.final, honest.final)
    refused = federation.sink.of(ClientRefused)
    assert refused
    assert {(event.client, event.reason) for event in refused} == {("c", "an answer to work that is closed: not used")}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("address", ["line-to-c", "line-to-nobody"])
@pytest.mark.parametrize(
    "key", [TaskKey(run_id="run-1", round=99, attempt=0), TaskKey(run_id="run-1", round=1, attempt=5),
            TaskKey(run_id="another", round=1, attempt=0)], ids=["to come", "never given", "of another run"],
)  # fmt: skip
def test_uploads_that_nobody_asked_for_change_nothing(key: TaskKey, address: str, algorithm: str) -> None:
    honest, federation = world(algorithm), world(algorithm)
    size = federation.trainer("c").bound_model.params.layout.num_shared
    for number in range(40):
        unasked = Upload(
            key=key,
            vectors={"delta": torch.full((size,), 1e6)},
            num_examples=5,
            num_steps=1,
            train_loss=0.1,
            seconds=0.1,
        )
        federation.transport.arrive(
            Reply(address=address, message=unasked, num_bytes=10, task=key), delay=0.05 + 0.31 * number
        )
    assert honest.run() is federation.run() is RunStatus.FINISHED
    assert torch.equal(federation.final, honest.final)
    assert members(federation) == members(honest)
    assert len(federation.sink.of(ClientRefused)) >= 20


def test_a_client_that_answers_evaluations_with_uploads_is_given_up_at_the_deadline() -> None:
    def uploads(message: ServerMessage, honest: Answer) -> Answer:
        if not isinstance(honest, Evaluation):
            return honest
        return Upload(
            key=honest.key, vectors={"delta": torch.zeros(3)}, num_examples=5, num_steps=1, train_loss=0.1, seconds=0.1
        )

    federation = world(tampers={"c": uploads}, rounds={"timeout": 6.0})
    assert federation.run() is RunStatus.FINISHED
    found = [(m.status, m.reason) for record in federation.finished for m in record.clients if m.client == "c"]
    assert set(found) == {(ClientStatus.LATE, "no answer within 6 s")}


def test_variances_never_fall_below_zero() -> None:
    def lies(upload: Upload) -> Answer:
        return replace(upload, vectors={**upload.vectors, "delta": upload.delta - 100.0})

    federation = world(tampers={"c": on_upload(lies)})
    federation.run()
    assert all(state.model.params[-4:].min() >= 0 for state in federation.checkpoints.states), "running variances"
    assert any(m.client == "c" for found in members(federation) for m in found), "nobody lied: the test shows nothing"


def test_a_claim_of_many_validation_photos_does_not_decide_the_accuracy() -> None:
    """All of them right, it says; it weighs no more than --max-examples allows."""
    claimed, cap = 1_000_000, 12

    def claims(message: ServerMessage, honest: Answer) -> Answer:
        if isinstance(honest, Ready):
            return replace(honest, num_validation=claimed)
        return replace(honest, num_examples=claimed, num_correct=claimed) if isinstance(honest, Evaluation) else honest

    def wrong(message: ServerMessage, honest: Answer) -> Answer:
        return replace(honest, num_correct=0) if isinstance(honest, Evaluation) else honest

    federation = world(tampers={"a": wrong, "b": wrong, "c": claims}, rounds={"max_examples": cap})
    federation.run()
    assert federation.finished[-1].accuracy == pytest.approx(cap / (cap + 4 + 4))


def test_who_has_gone_does_not_count_in_the_accuracy_any_more() -> None:
    def evaluates(correct: int) -> Callable[[ServerMessage, Answer], Answer]:
        def tamper(message: ServerMessage, honest: Answer) -> Answer:
            if isinstance(honest, Upload) and correct:
                return Gone()
            return replace(honest, num_correct=correct) if isinstance(honest, Evaluation) else honest

        return tamper

    federation = world(tampers={"a": evaluates(0), "b": evaluates(0), "c": evaluates(4)})
    federation.run()
    accuracies = [record.accuracy for record in federation.finished]
    assert accuracies[0] == pytest.approx(4 / 12)
    assert accuracies[-1] == 0
