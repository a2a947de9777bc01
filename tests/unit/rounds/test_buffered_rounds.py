"""Asynchronous rounds: who is at work, what makes a version, what is stale, and what outlives the server."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedshelf.algorithms.fedasync import FedAsync
from fedshelf.algorithms.fedbuff import FedBuff
from fedshelf.core.errors import RunError
from fedshelf.core.events import ClientStatus, Participation, RoundVoid, RunStatus, UploadReceived
from fedshelf.core.messages import Broadcast, Evaluation, Failure, Purpose, ServerMessage, TaskKey, Upload
from fedshelf.core.state import ClientState
from fedshelf.training.trainer import Trainer
from tests.fakes import Answer, Gone
from tests.worlds import World, linear, with_batch_norm

FAST, SLOW = 1.0, 10.5  # seconds to answer anything


@dataclass
class Witness:
    """Sees what clients are asked, and what they honestly answer."""

    asked: list[tuple[str, Broadcast]] = field(default_factory=list)
    uploads: dict[tuple[str, TaskKey], Upload] = field(default_factory=dict)

    def watch(self, world: World) -> World:
        for name in world.names:
            world.tampers[name] = self._tamper(name, world.tampers.get(name, lambda message, honest: honest))
        return world

    def _tamper(self, name: str, then: Callable[[ServerMessage, Answer], Answer]) -> Any:
        def tamper(message: ServerMessage, honest: Answer) -> Answer:
            if isinstance(message, Broadcast):
                self.asked.append((name, message))
            if isinstance(honest, Upload):
                self.uploads[name, honest.key] = honest
            return then(message, honest)

        return tamper

    def tasks(self, name: str) -> list[Broadcast]:
        """What `name` was asked to train."""
        return [b for asked, b in self.asked if asked == name and b.purpose is Purpose.TRAIN]

    def counted(self, world: World) -> list[list[tuple[Participation, Upload]]]:
        """Per round, the records of counted uploads with the uploads, found by what the record says of them."""
        rounds = []
        for record in world.finished:
            found = []
            answered: dict[str, int] = {}
            for member in record.clients:
                if member.status is ClientStatus.COUNTED:
                    began = record.round - (member.staleness or 0)
                    attempt = answered.get(f"{member.client}{began}", 0)
                    answered[f"{member.client}{began}"] = attempt + 1
                    key = TaskKey(run_id="run-1", round=began, attempt=attempt)
                    found.append((member, self.uploads[member.client, key]))
            rounds.append(found)
        return rounds


def buffered(**settings: Any) -> World:
    return World(**{"algorithm": FedBuff(server_lr=1.0, buffer_size=2), "num_rounds": 8, **settings})


def test_a_version_is_made_of_as_many_uploads_as_the_buffer_holds_while_the_slow_are_at_work() -> None:
    world = buffered(delays={"a": FAST, "b": FAST, "c": SLOW})
    assert world.run() is RunStatus.FINISHED
    assert [len(record.clients) for record in world.finished] == [2] * 8
    stale = {m.staleness for record in world.finished for m in record.clients if m.client == "c"}
    # c evaluates for 10.5 s and trains for as long; the others make a version every 2 s: it begins on version 5 or 6.
    assert stale == set() or min(s for s in stale if s is not None) >= 4
    longer = buffered(delays={"a": FAST, "b": FAST, "c": SLOW}, num_rounds=14)
    longer.run()
    members = [m for record in longer.finished for m in record.clients]
    assert {m.client for m in members} == {"a", "b", "c"}
    assert max(m.staleness or 0 for m in members) >= 4
    assert {m.staleness for m in members if m.client != "c"} <= {0, 1}


@pytest.mark.parametrize("module", [linear, with_batch_norm])
def test_versions_of_fedbuff_are_what_the_paper_says(module: Callable[[], nn.Module]) -> None:
    """w <- w + eta_g/K · sum s(tau_i) delta_i; batch-norm statistics are the weighted mean of the clients' own."""
    world = buffered(
        delays={"a": FAST, "b": 2.2, "c": 5.3}, algorithm=FedBuff(server_lr=0.7, buffer_size=3), module=module
    )
    witness = Witness()
    witness.watch(world).run()
    count = world.trainer("a").bound_model.params.layout.num_trainable
    models = _models(world)
    staleness = set()
    for number, members in enumerate(witness.counted(world), start=1):
        weights = [(1 + (member.staleness or 0)) ** -0.5 for member, _ in members]
        staleness |= {member.staleness for member, _ in members}
        before, after = models[number - 1], models[number]
        step = sum((w * u.delta[:count] for w, (_, u) in zip(weights, members, strict=True)), torch.zeros(count)) / 3
        torch.testing.assert_close(after[:count], before[:count] + 0.7 * step)
        own = [models[u.key.round - 1][count:] + u.delta[count:] for _, u in members]
        mean = sum((w * s for w, s in zip(weights, own, strict=True)), torch.zeros(len(own[0]))) / sum(weights)
        torch.testing.assert_close(after[count:], mean)
    assert len(staleness) > 1, "nobody was stale: the test shows nothing"


def test_the_order_in_which_uploads_come_changes_not_one_bit_of_the_version_that_they_make() -> None:
    finals = []
    for seed in range(4):
        world = buffered(
            algorithm=FedBuff(server_lr=1.0, buffer_size=3), delays=dict.fromkeys("abc", FAST), num_rounds=4,
            module=with_batch_norm, order=random.Random(seed),
        )  # fmt: skip
        world.run()
        finals.append((tuple(event.client for event in world.sink.of(UploadReceived)), world.final))
    assert len({order for order, _ in finals}) > 1, "all came in the same order: the test shows nothing"
    assert all(torch.equal(final, finals[0][1]) for _, final in finals)


def test_versions_of_fedasync_are_what_the_paper_says() -> None:
    """x <- (1 - alpha_t) x + alpha_t x_new, with alpha_t = alpha · (1 + staleness)^-a."""
    world = buffered(
        algorithm=FedAsync(alpha=0.6, rho=0.0, exponent=0.5), delays={"a": FAST, "b": 2.2, "c": 5.3}, num_rounds=14,
        module=with_batch_norm,
    )  # fmt: skip
    witness = Witness()
    witness.watch(world).run()
    models = _models(world)
    for number, ((member, upload),) in enumerate(witness.counted(world), start=1):
        alpha = 0.6 * (1 + (member.staleness or 0)) ** -0.5
        new = models[upload.key.round - 1] + upload.delta
        torch.testing.assert_close(models[number], (1 - alpha) * models[number - 1] + alpha * new)
    assert max(m.staleness or 0 for record in world.finished for m in record.clients) >= 2


def test_an_upload_from_too_old_a_model_is_late_and_leaves_no_trace_at_the_client() -> None:
    world = buffered(
        algorithm=Remembering(), delays={"a": FAST, "b": FAST, "c": SLOW}, num_rounds=30, plan={"max_staleness": 3}
    )  # fmt: skip
    witness = Witness()
    witness.watch(world).run()
    late = [m for record in world.finished for m in record.clients if m.client == "c"]
    assert late
    assert {m.status for m in late} == {ClientStatus.LATE}
    assert all("--max-staleness is 3" in m.reason and (m.staleness or 0) > 3 for m in late)
    assert [task.counted for task in witness.tasks("c")] == [None] * len(witness.tasks("c"))
    assert world.clients["c"] is not None
    newest = witness.tasks("c")[-1]
    assert not world.states["c"].commit_or_rollback(replace(newest, key=replace(newest.key, round=99))).algorithm


def test_an_upload_of_just_the_age_that_is_allowed_counts_and_an_older_one_does_not() -> None:
    def first_of_the_slow(most: int | None) -> Participation:
        world = buffered(delays={"a": FAST, "b": FAST, "c": SLOW}, num_rounds=30, plan={"max_staleness": most})
        world.run()
        return next(m for record in world.finished for m in record.clients if m.client == "c")

    age = first_of_the_slow(None).staleness
    assert age is not None
    assert first_of_the_slow(age).status is ClientStatus.COUNTED
    assert first_of_the_slow(age - 1).status is ClientStatus.LATE


def test_a_client_goes_on_from_the_state_of_its_upload_that_waits_in_the_buffer() -> None:
    world = buffered(algorithm=Remembering(buffer_size=4), delays={"a": FAST, "b": 3.1, "c": 3.1}, num_rounds=4)
    witness = Witness()
    witness.watch(world).run()
    tasks = witness.tasks("a")
    assert any(later.key.round == earlier.key.round for earlier, later in pairwise(tasks))
    assert [task.counted for task in tasks] == [None, *(task.key for task in tasks[:-1])]
    memories = [witness.uploads["a", task.key].delta for task in tasks[:-1]]
    for task, before in zip(tasks[1:-1], memories, strict=False):
        own = _honest(world, task)
        torch.testing.assert_close(witness.uploads["a", task.key].delta, own + 0.5 * before)


def test_a_task_has_the_learning_rate_of_the_version_that_it_is_for() -> None:
    world = buffered(delays={"a": FAST, "b": FAST, "c": 3.1}, plan={"client_lr": lambda number: 0.1 / number})
    witness = Witness()
    witness.watch(world).run()
    rates = {(task.key.round, task.client_lr) for name in world.names for task in witness.tasks(name)}
    assert len(rates) > 4
    assert all(rate == 0.1 / number for number, rate in rates)


def test_a_client_that_comes_back_is_asked_again_for_what_it_was_at() -> None:
    world = buffered(delays={"a": FAST, "b": FAST, "c": SLOW}, num_rounds=20)
    witness = Witness()
    witness.watch(world)
    world.connect_all()
    line = world.peer("c", address="another line")
    world.transport.connect(line, delay=2 * SLOW + 2.0)  # it has evaluated, and is at its training
    assert world.server().run() is RunStatus.FINISHED
    first, again = witness.tasks("c")[:2]
    assert first.key == again.key
    assert torch.equal(first.params, again.params)


def test_two_tasks_on_one_model_draw_photos_in_different_orders() -> None:
    world = buffered(delays={"a": FAST, "b": SLOW, "c": SLOW}, algorithm=FedBuff(server_lr=1.0, buffer_size=4))
    witness = Witness()
    witness.watch(world).run()
    first, again = witness.tasks("a")[:2]
    assert (first.key.round, first.key.attempt) == (1, 0)
    assert (again.key.round, again.key.attempt) == (1, 1)
    assert torch.equal(first.params, again.params)
    assert not torch.equal(witness.uploads["a", first.key].delta, witness.uploads["a", again.key].delta)


def test_clients_that_fail_wait_for_the_next_version_and_stop_nobody() -> None:
    def fails(message: ServerMessage, honest: Answer) -> Answer:
        is_task = isinstance(message, Broadcast) and message.purpose is Purpose.TRAIN
        return Failure(key=message.key, reason="no memory") if is_task else honest  # type: ignore[union-attr]

    world = buffered(delays={"a": FAST, "b": FAST, "c": FAST}, tampers={"c": fails})
    assert world.run() is RunStatus.FINISHED
    for record in world.finished:
        failed = [member for member in record.clients if member.client == "c"]
        assert len(failed) <= 1
        assert all(m.status is ClientStatus.FAILED and m.reason == "no memory" for m in failed)
    everybody = buffered(tampers=dict.fromkeys("abc", fails))
    with pytest.raises(RunError, match=r"no client is left.*no memory"):
        everybody.run()
    assert len(everybody.sink.of(RoundVoid)) == 2, "the third failure excludes them"


def test_an_upload_that_is_not_finite_is_refused_and_the_version_is_made_of_others() -> None:
    def poisons(message: ServerMessage, honest: Answer) -> Answer:
        return (
            replace(honest, vectors={**honest.vectors, "delta": honest.delta * float("nan")})
            if isinstance(honest, Upload)
            else honest
        )

    world = buffered(tampers={"b": poisons})
    world.run()
    assert {m.client for r in world.finished for m in r.clients if m.status is ClientStatus.REFUSED} == {"b"}
    assert {m.client for r in world.finished for m in r.clients if m.status is ClientStatus.COUNTED} == {"a", "c"}
    assert torch.isfinite(world.final).all()


def test_a_client_that_is_lost_at_work_is_offline_and_the_others_go_on() -> None:
    def dies(message: ServerMessage, honest: Answer) -> Answer:
        return Gone() if isinstance(message, Broadcast) and message.purpose is Purpose.TRAIN else honest

    world = buffered(delays={"a": FAST, "b": FAST, "c": FAST}, tampers={"c": dies})
    assert world.run() is RunStatus.FINISHED
    lost = [m for record in world.finished for m in record.clients if m.client == "c"]
    assert [m.status for m in lost] == [ClientStatus.OFFLINE]


def test_a_task_that_takes_too_long_is_given_up_and_its_late_answer_not_used() -> None:
    world = buffered(delays={"a": FAST, "b": FAST, "c": 30.0}, rounds={"timeout": 12.0}, num_rounds=40)
    world.run()
    late = [m for record in world.finished for m in record.clients if m.client == "c"]
    assert late
    assert {m.status for m in late} == {ClientStatus.LATE}
    assert "no answer within 12 s" in late[0].reason


def test_the_accuracy_of_a_round_is_over_the_newest_evaluation_of_every_client() -> None:
    scores = {"a": 1, "b": 2, "c": 4}

    def evaluates(name: str) -> Any:
        def tamper(message: ServerMessage, honest: Answer) -> Answer:
            return replace(honest, num_correct=scores[name]) if isinstance(honest, Evaluation) else honest

        return tamper

    world = buffered(tampers={name: evaluates(name) for name in scores}, num_rounds=3)
    world.run()
    assert world.finished[-1].accuracy == pytest.approx((1 + 2 + 4) / 12)


def test_a_restarted_server_counts_what_it_had_received_and_asks_again_for_what_was_out() -> None:
    world = buffered(
        algorithm=FedBuff(server_lr=1.0, buffer_size=3), delays={"a": 1.0, "b": 5.2, "c": 7.3}, num_rounds=6
    )  # fmt: skip
    witness = Witness()
    witness.watch(world)

    def stops(message: ServerMessage, honest: Answer) -> Answer:
        if len(world.finished) == 2 and isinstance(honest, Upload) and honest.key.attempt:
            world.stop.set()
        return honest

    world.tampers["a"] = witness._tamper("a", stops)
    assert world.run() is RunStatus.STOPPED
    saved = world.checkpoints.states[-1]
    spooled = {
        (number, name)
        for number in range(3)
        for name in world.spool.names(TaskKey(run_id="run-1", round=saved.round + 1, attempt=number))
    }
    assert saved.in_flight, "nothing was out: the test shows nothing"
    assert spooled, "nothing was received: the test shows nothing"
    asked = len(witness.asked)
    world.stop.clear()
    world.tampers["a"] = witness._tamper("a", lambda message, honest: honest)
    world.restart()
    assert world.server().run() is RunStatus.FINISHED
    first, again = (
        {(name, task.key): task for name, task in tasks if task.purpose is Purpose.TRAIN}
        for tasks in (witness.asked[:asked], witness.asked[asked:])
    )
    assert {(flight.client, flight.key) for flight in saved.in_flight} <= again.keys()
    for flight in saved.in_flight:
        before, after = first[flight.client, flight.key], again[flight.client, flight.key]
        assert torch.equal(before.params, after.params), "it trains from what it had begun with"
        assert before.client_lr == after.client_lr
    third = next(record for record in world.finished if record.round == saved.round + 1)
    assert {(m.number, m.client) for m in third.clients} >= spooled


def test_what_a_client_was_at_is_remembered_through_servers_that_it_did_not_come_back_to() -> None:
    world = buffered(delays={"a": FAST, "b": FAST, "c": 40.0}, num_rounds=60, rounds={"rejoin_grace": 5.0})
    witness = Witness()
    witness.watch(world).run()

    def out() -> list[TaskKey]:
        return [flight.key for flight in world.checkpoints.states[-1].in_flight if flight.client == "c"]

    (lost,) = out()
    asked = len(witness.tasks("c"))
    for last, names in ((62, "ab"), (64, "ab"), (100, "abc")):
        assert out() == [lost]
        assert len(witness.tasks("c")) == asked
        world.num_rounds, world.names = last, tuple(names)
        world.restart()
        assert world.server().run() is RunStatus.FINISHED
    assert witness.tasks("c")[asked].key == lost


def test_only_so_many_are_at_work_as_a_cohort_has() -> None:
    world = buffered(plan={"fraction": 0.5}, delays=dict.fromkeys("abc", FAST))
    at_work: set[str] = set()
    most = 0

    def watches(name: str) -> Any:
        def tamper(message: ServerMessage, honest: Answer) -> Answer:
            nonlocal most
            if isinstance(message, Broadcast) and not message.per_product:  # after the last round, all evaluate
                at_work.add(name)
                most = max(most, len(at_work))
            return honest

        return tamper

    receive = world.transport.receive

    def received(timeout: float) -> Any:
        arrival = receive(timeout)
        at_work.discard(getattr(arrival, "address", "").removeprefix("line-to-"))
        return arrival

    world.transport.receive = received  # type: ignore[method-assign]
    world.tampers = {name: watches(name) for name in world.names}
    assert world.run() is RunStatus.FINISHED
    assert most == 2


@dataclass(frozen=True)
class Remembering(FedBuff):
    """FedBuff whose clients remember: what one uploads, its next task adds half of."""

    server_lr: float = 0.1
    buffer_size: int = 2

    def client_round(self, broadcast: Broadcast, state: ClientState, trainer: Trainer) -> tuple[Upload, ClientState]:
        upload = trainer.upload(broadcast)
        memory = state.algorithm.get("memory", torch.zeros_like(upload.delta)) * 0.5 + upload.delta
        return replace(upload, vectors={**upload.vectors, "delta": memory}), ClientState(algorithm={"memory": memory})


def _honest(world: World, task: Broadcast) -> Tensor:
    return world.trainer("a").upload(task).delta


def _models(world: World) -> dict[int, Tensor]:
    """The global model after each round; after none, what it began with."""
    first = next(m.params for _, m in world.transport.sent if isinstance(m, Broadcast))
    return {0: first, **{state.round: state.model.params for state in world.checkpoints.states}}
