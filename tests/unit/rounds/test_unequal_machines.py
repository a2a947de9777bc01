"""Machines that differ, in rounds on fake ports: observed speed, a deadline from it, over-selection, steps by speed."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedshelf.algorithms.fedavg import FedAvg
from fedshelf.algorithms.scaffold import CONTROL_VARIATE, Scaffold
from fedshelf.core.choices import LocalWork, WorkNorm
from fedshelf.core.events import ClientRefused, RoundFinished, RoundStarted, RoundVoid, RunStatus
from fedshelf.core.messages import Broadcast, ClientMessage, Failure, Purpose, ServerMessage, TaskKey, Upload
from fedshelf.core.ports import Arrival, Received, Reply
from fedshelf.core.state import ClientState
from fedshelf.scheduling.work_assignment import Pacing
from fedshelf.scheduling.workload import Workload
from fedshelf.storage.spool import MemorySpool
from fedshelf.training.trainer import Trainer
from tests.fakes import Answer, FakeTransport
from tests.worlds import PLAIN, World, aggregator, with_batch_norm

FOUR, EIGHT = tuple("abcd"), tuple("abcdefgh")
EPOCHS = replace(PLAIN, local_epochs=4)
STEPS = {"a": 8, "b": 12, "c": 12, "d": 8}  # of four epochs over 8, 9, 10 and 6 photos in fours


def statuses(record: RoundFinished | RoundVoid) -> dict[str, str]:
    return {member.client: member.status.value for member in record.clients}


def reason(record: RoundFinished | RoundVoid, client: str) -> str:
    return next(member.reason for member in record.clients if member.client == client)


def paced(rule: LocalWork = "fixed", norm: WorkNorm = "l2", **settings: Any) -> dict[str, Any]:
    """A plan with these ways to deal with machines that differ."""
    workload = Workload(rule=rule, norm=norm, training=EPOCHS)
    return {"pacing": Pacing(workload=workload, **settings)}


def four(**settings: Any) -> World:
    given: dict[str, Any] = {
        "names": FOUR, "training": EPOCHS, "paces": dict.fromkeys(FOUR, 1.0), "rounds": {"timeout": 1000.0},
    }  # fmt: skip
    return World(**{**given, **settings})


def from_round(world: World, number: int, paces: dict[str, float]) -> None:
    """Let the machines run at other paces (seconds per step) from a round on."""

    def change(message: ServerMessage, honest: Answer) -> Answer:
        if isinstance(message, Broadcast) and message.key.round >= number:
            world.paces.update(paces)
        return honest

    world.tampers = {**dict.fromkeys(world.names, change), **world.tampers}


def steps_asked(world: World, number: int) -> dict[str, int | None]:
    return {
        address[-1]: message.num_steps
        for address, message in world.transport.sent
        if isinstance(message, Broadcast) and message.purpose is Purpose.TRAIN and message.key.round == number
    }


def test_the_configured_steps_are_those_that_clients_take() -> None:
    world = four(num_rounds=1)
    world.run()
    assert {member.client: member.num_steps for member in world.finished[0].clients} == STEPS
    assert {name: paced()["pacing"].workload.configured(len(world.trainer(name).train)) for name in FOUR} == STEPS


def test_the_server_measures_seconds_per_step_by_its_own_clock() -> None:
    world = four(num_rounds=3, plan=paced(straggler_factor=50.0))
    world.paces = {"a": 1.0, "b": 2.0, "c": 0.5, "d": 4.0}

    def lie(message: ServerMessage, honest: Answer) -> Answer:
        return replace(honest, seconds=1e6) if isinstance(honest, Upload) else honest

    world.tampers = dict.fromkeys(FOUR, lie)
    world.run()
    assert world.checkpoints.states[-1].pace == pytest.approx(world.paces)


def test_a_machine_that_slows_down_is_half_known_to_be_slow_after_one_round() -> None:
    world = four(num_rounds=2, plan=paced(straggler_factor=50.0))
    from_round(world, 2, {"b": 3.0})
    world.run()
    assert [state.pace["b"] for state in world.checkpoints.states] == pytest.approx([1.0, 2.0])


def test_nobody_is_timed_where_nothing_depends_on_it() -> None:
    world = four(num_rounds=2)
    world.run()
    assert world.checkpoints.states[-1].pace == {}


def test_after_the_factor_times_the_median_of_what_was_predicted_a_quorum_is_enough() -> None:
    """Predicted are 8, 12, 12 and 8 seconds: twice their median is 20."""
    world = four(num_rounds=2, plan=paced(straggler_factor=2.0))
    from_round(world, 2, {"d": 50.0})
    world.run()
    first, second = world.finished
    assert set(statuses(first).values()) == {"counted"}
    assert statuses(second) == {"a": "counted", "b": "counted", "c": "counted", "d": "late"}
    assert reason(second, "d") == "no answer within 20 s: after 20 s a quorum is enough (--straggler-factor)"
    assert second.seconds == pytest.approx(20.0)
    assert world.checkpoints.states[-1].pace["d"] == pytest.approx(20 / 8), "it is at least so slow"


def test_the_first_round_has_the_timeout_for_nobody_was_seen() -> None:
    world = four(num_rounds=1, plan=paced(straggler_factor=1.0), rounds={"timeout": 30.0})
    world.paces["d"] = 50.0
    world.run()
    assert reason(world.finished[0], "d") == "no answer within 30 s"


def test_the_timeout_holds_whatever_was_predicted() -> None:
    world = four(num_rounds=2, plan=paced(straggler_factor=5.0), rounds={"timeout": 30.0})
    from_round(world, 2, {"d": 50.0})
    world.run()
    assert reason(world.finished[1], "d") == "no answer within 30 s"


def test_everybody_has_a_second() -> None:
    world = four(num_rounds=2, plan=paced(straggler_factor=1.0), paces=dict.fromkeys(FOUR, 1e-4))
    from_round(world, 2, dict.fromkeys(FOUR, 0.07))
    world.run()
    assert set(statuses(world.finished[1]).values()) == {"counted"}


def test_no_attempt_is_void_for_what_was_predicted() -> None:
    """Half of the machines are a hundred times slower at once: the third upload, which is needed, takes 800 seconds."""
    world = four(num_rounds=2, plan=paced(straggler_factor=1.5), rounds={"timeout": 5000.0, "quorum": 3})
    from_round(world, 2, {"c": 100.0, "d": 100.0})
    assert world.run() is RunStatus.FINISHED
    assert not world.sink.of(RoundVoid)
    assert statuses(world.finished[1]) == {"a": "counted", "b": "counted", "c": "late", "d": "counted"}
    assert (
        reason(world.finished[1], "c") == "no answer within 800 s: after 15 s a quorum is enough (--straggler-factor)"
    )


def test_a_void_attempt_has_shown_who_is_slow() -> None:
    """All had ten steps of a second each; ten of d's now take 150. Given two or three, it is in time."""
    world = four(num_rounds=2, plan=paced("dynamic"), rounds={"timeout": 50.0, "quorum": 4})
    from_round(world, 2, {"d": 15.0})
    assert world.run() is RunStatus.FINISHED
    (void,) = world.sink.of(RoundVoid)
    assert statuses(void) == {"a": "counted", "b": "counted", "c": "counted", "d": "late"}
    assert (world.finished[1].attempt, steps_asked(world, 2)["d"]) in [(1, 2), (1, 3)]


def test_members_of_a_resumed_round_may_come_back_before_a_quorum_is_enough() -> None:
    world = four(num_rounds=2, plan=paced(straggler_factor=1.5), rounds={"timeout": 5000.0, "rejoin_grace": 60.0})
    from_round(world, 2, {})

    def stop(message: ServerMessage, honest: Answer) -> Answer:
        if isinstance(honest, Upload) and honest.key.round == 2:
            world.stop.set()
            return None
        return honest

    world.tampers["a"] = stop
    assert world.run() is RunStatus.STOPPED
    world.stop.clear()
    world.tampers.clear()
    world.transport = FakeTransport(world.clock)
    for name in FOUR:
        world.transport.connect(world.peer(name), delay=40.0)  # a quorum would be enough at 15
    assert world.server().run() is RunStatus.FINISHED
    assert set(statuses(world.finished[1]).values()) == {"counted"}


def over_selecting(share: float, **settings: Any) -> World:
    """Half of eight are wanted; the later in the alphabet, the slower."""
    given: dict[str, Any] = {
        "names": EIGHT, "delays": {name: 10.0 * (i + 1) for i, name in enumerate(EIGHT)},
        "plan": {"fraction": 0.5, **paced(over_selection=share)}, "rounds": {"quorum": None, "timeout": 500.0},
    }  # fmt: skip
    return World(**{**given, **settings})


def test_of_more_than_are_wanted_the_first_count() -> None:
    world = over_selecting(0.5, num_rounds=4)
    world.run()
    for record, started in zip(world.finished, world.sink.of(RoundStarted), strict=True):
        assert len(started.cohort) == 6
        first, last = started.cohort[:4], started.cohort[4:]
        assert statuses(record) == {**dict.fromkeys(first, "counted"), **dict.fromkeys(last, "late")}
        for name in last:
            assert (
                reason(record, name)
                == "not needed any more: the wanted number of uploads (4) had arrived (--over-selection)"
            )
    closed = [event for event in world.sink.of(ClientRefused) if "closed" in event.reason]
    assert closed, "those who were not needed have answered later"


def test_as_many_as_there_are_at_most_are_asked() -> None:
    world = over_selecting(5.0, num_rounds=1)
    world.run()
    assert world.sink.of(RoundStarted)[0].cohort == EIGHT
    assert list(statuses(world.finished[0]).values()) == ["counted"] * 4 + ["late"] * 4


def test_a_refused_upload_is_none_of_those_wanted() -> None:
    world = over_selecting(1.0, num_rounds=1)
    world.tampers["b"] = lambda m, h: (
        replace(h, vectors={**h.vectors, "delta": h.delta * float("nan")}) if isinstance(h, Upload) else h
    )
    world.tampers["c"] = lambda m, h: Failure(key=h.key, reason="no disk") if isinstance(h, Upload) else h
    world.run()
    expected = ["counted", "refused", "failed", "counted", "counted", "counted", "late", "late"]
    assert list(statuses(world.finished[0]).values()) == expected


@pytest.mark.parametrize(("num_silent", "void"), [(5, False), (6, True)])
def test_the_quorum_is_of_those_wanted_not_of_those_asked(num_silent: int, void: bool) -> None:
    """Four are wanted, so three are enough; of eight asked six would be."""
    world = over_selecting(1.0, num_rounds=1, rounds={"quorum": None, "timeout": 500.0})
    for name in EIGHT[:num_silent]:
        world.tampers[name] = lambda m, h: None if isinstance(h, Upload) and h.key.attempt == 0 else h
    world.run()
    assert bool(world.sink.of(RoundVoid)) == void
    if void:
        assert world.sink.of(RoundVoid)[0].reason == "counted 2 of 4, the quorum is 3"


def test_without_over_selection_the_cohort_is_what_it_was() -> None:
    plain, none = over_selecting(0.0, plan={"fraction": 0.5}, num_rounds=3), over_selecting(0.0, num_rounds=3)
    plain.run()
    none.run()
    assert torch.equal(none.final, plain.final)
    assert all(set(statuses(record).values()) == {"counted"} for record in none.finished)


@dataclass(frozen=True)
class CountingRounds(FedAvg):
    """Each client uploads in how many counted rounds it has been, this one included."""

    def client_round(self, broadcast: Broadcast, state: ClientState, trainer: Trainer) -> tuple[Upload, ClientState]:
        count = state.algorithm.get("count", torch.zeros(1)) + 1
        upload = trainer.upload(broadcast)
        return replace(upload, vectors={**upload.vectors, "delta": count.expand_as(upload.delta)}), ClientState(
            algorithm={"count": count}
        )


def test_those_who_were_not_needed_keep_nothing_of_the_round() -> None:
    world = over_selecting(1.0, num_rounds=5, algorithm=CountingRounds())
    sent: list[float] = []

    def note(message: ServerMessage, honest: Answer) -> Answer:
        if isinstance(honest, Upload):
            sent.append(honest.delta[0].item())
        return honest

    world.tampers["h"] = note
    world.run()
    assert [statuses(record)["h"] for record in world.finished] == ["late"] * 5
    assert sent == [1.0] * 5, "each time it begins where it was"
    assert "h" not in world.checkpoints.states[-1].counted


def test_scaffold_s_c_is_the_mean_of_the_clients_c_though_most_were_not_needed() -> None:
    world = over_selecting(0.5, num_rounds=6, algorithm=Scaffold(server_lr=1.0, option="2"))
    world.run()
    final = world.checkpoints.states[-1]
    assert {"late"} <= {status for record in world.finished for status in statuses(record).values()}
    total = torch.zeros_like(final.model.optimizer[CONTROL_VARIATE])
    for name in EIGHT:
        ask = Broadcast(
            key=TaskKey(run_id="run-1", round=99, attempt=0), purpose=Purpose.TRAIN,
            vectors={"params": final.model.params}, client_lr=0.1, counted=final.counted.get(name),
        )  # fmt: skip
        total += world.states[name].commit_or_rollback(ask).algorithm.get(CONTROL_VARIATE, torch.zeros_like(total))
    torch.testing.assert_close(final.model.optimizer[CONTROL_VARIATE], total / 8, rtol=1e-5, atol=1e-6)


def test_a_server_restarted_with_all_uploads_that_it_wanted_asks_nobody_again() -> None:
    uninterrupted = over_selecting(1.0, num_rounds=1)
    uninterrupted.run()

    world = over_selecting(1.0, num_rounds=1)

    def stop_at_evaluation(message: ServerMessage, honest: Answer) -> Answer:
        if isinstance(message, Broadcast) and message.purpose is Purpose.EVALUATE:
            world.stop.set()
            return None
        return honest

    world.tampers["a"] = stop_at_evaluation
    assert world.run() is RunStatus.STOPPED
    world.stop.clear()
    world.tampers.clear()
    world.restart()
    assert world.server().run() is RunStatus.FINISHED
    assert not [message for message in world.transport.broadcasts() if message.purpose is Purpose.TRAIN]
    assert torch.equal(world.final, uninterrupted.final)


SLOWNESS = {"a": 1.0, "b": 1.0, "c": 2.0, "d": 4.0}
DEALT = {"a": 15, "b": 15, "c": 7, "d": 4}  # T of 14.55 s: 40 steps; a could have 16


def test_the_first_round_is_as_configured_and_the_next_ones_by_the_speeds_seen() -> None:
    world = four(num_rounds=3, plan=paced("dynamic"), paces=SLOWNESS)
    world.run()
    assert steps_asked(world, 1) == dict.fromkeys(FOUR)
    dealt = Workload(rule="dynamic", training=EPOCHS).deal(STEPS, SLOWNESS)
    assert dealt == DEALT
    for number in (2, 3):
        assert steps_asked(world, number) == DEALT
        members = world.finished[number - 1].clients
        assert {member.client: member.num_steps for member in members} == DEALT
    assert world.finished[0].seconds == pytest.approx(32.0)
    assert world.finished[1].seconds == pytest.approx(16.0), "d's four steps; nobody can do half a step"


def test_cutting_takes_work_from_the_slow_and_gives_it_to_nobody() -> None:
    world = four(num_rounds=2, plan=paced("cut"), paces=SLOWNESS)
    world.run()
    assert steps_asked(world, 2) == {"a": None, "b": None, "c": 9, "d": 4}, "18 s is the median of 8, 12, 24 and 32"


def test_machines_that_finish_together_are_sent_what_they_always_were_to_the_last_bit() -> None:
    together: dict[str, Any] = {"module": with_batch_norm, "paces": {}, "delays": dict.fromkeys(FOUR, 24.0)}
    fixed = four(num_rounds=3, **together)
    dynamic = four(num_rounds=3, **together, plan=paced("dynamic"))
    fixed.run()
    dynamic.run()
    assert steps_asked(dynamic, 3) == dict.fromkeys(FOUR)
    assert torch.equal(dynamic.final, fixed.final)


def noting(world: World, number: int) -> dict[str, Upload]:
    """The uploads of a round as clients sent them, filled while the world runs."""
    uploads: dict[str, Upload] = {}
    for name in world.names:

        def note(message: ServerMessage, honest: Answer, name: str = name) -> Answer:
            if isinstance(honest, Upload) and honest.key.round == number:
                uploads[name] = honest
            return honest

        world.tampers[name] = note
    return uploads


@pytest.mark.parametrize(("norm", "exponent"), [("l1", 1.0), ("l2", 0.5), ("none", 0.0)])
def test_unequal_work_is_weighed_in_the_aggregate_and_statistics_are_averaged_as_they_are(
    norm: WorkNorm, exponent: float
) -> None:
    world = four(num_rounds=2, module=with_batch_norm, plan=paced("dynamic", norm), paces=SLOWNESS)
    uploads = noting(world, 2)
    world.run()
    start, end = (world.checkpoints.states[i].model.params for i in (0, 1))
    total = sum(upload.weight for upload in uploads.values())
    weights = {name: upload.weight / total for name, upload in uploads.items()}
    asked = {name: steps or STEPS[name] for name, steps in steps_asked(world, 2).items()}
    assert max(asked[name] / STEPS[name] for name in FOUR) > 2 * min(asked[name] / STEPS[name] for name in FOUR)
    shares = {name: (asked[name] / STEPS[name]) ** exponent for name in FOUR}  # plain steps: no momentum
    length = sum(weights[name] * shares[name] for name in FOUR)
    normalized: list[Tensor] = [weights[name] * uploads[name].delta / shares[name] for name in FOUR]
    plain: list[Tensor] = [weights[name] * uploads[name].delta for name in FOUR]
    expected = start + length * torch.stack(normalized).sum(0)
    averaged = start + torch.stack(plain).sum(0)
    torch.testing.assert_close(end[:-8], expected[:-8], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(end[-8:], averaged[-8:], rtol=1e-5, atol=1e-6)
    assert ((end[:-8] - averaged[:-8]).abs().max() > 1e-4) == (norm != "none")


def test_what_a_client_claims_to_have_done_decides_neither_how_it_counts_nor_what_it_is_asked() -> None:
    def run(claim: int | None) -> World:
        world = four(num_rounds=3, plan=paced("dynamic"), paces=SLOWNESS)
        if claim is not None:
            world.tampers["d"] = lambda m, h: replace(h, num_steps=claim, seconds=0.0) if isinstance(h, Upload) else h
        world.run()
        assert steps_asked(world, 3) == DEALT
        return world

    honest = run(None).final
    for claim in (0, 1, 2**63 - 1):
        assert torch.equal(run(claim).final, honest)


def test_a_norm_bound_holds_for_what_becomes_of_an_upload_not_for_what_was_sent() -> None:
    """A slow client's upload is scaled up: it must not gain by that what the bound denies to others."""
    bound = 0.01
    plan = {**paced("dynamic"), "aggregator": aggregator("mean", trim=0.25, norm_bound=bound)}
    world = four(num_rounds=2, plan=plan, paces=SLOWNESS)
    world.tampers["d"] = lambda m, h: (
        replace(h, vectors={**h.vectors, "delta": h.delta * 1e4}) if isinstance(h, Upload) else h
    )
    world.run()
    share = paced()["pacing"].workload.share
    length = sum(
        member.num_examples * share(DEALT[member.client], STEPS[member.client])
        for member in world.finished[1].clients
        if member.num_examples is not None
    ) / sum(member.num_examples or 0 for member in world.finished[1].clients)
    change = world.checkpoints.states[1].model.params - world.checkpoints.states[0].model.params
    assert change.norm().item() <= bound * length * (1 + 1e-5)


def test_a_restarted_server_keeps_the_paces_and_asks_for_the_same() -> None:
    uninterrupted = four(num_rounds=2, plan=paced("dynamic"), paces=SLOWNESS)
    uninterrupted.run()

    world = four(num_rounds=2, plan=paced("dynamic"), paces=SLOWNESS)

    def stop(message: ServerMessage, honest: Answer) -> Answer:
        if isinstance(honest, Upload) and honest.key.round == 2:
            world.stop.set()
            return None
        return honest

    world.tampers["b"] = stop
    assert world.run() is RunStatus.STOPPED
    assert world.checkpoints.states[-1].pace == pytest.approx(SLOWNESS)
    world.stop.clear()
    world.tampers.clear()
    world.restart()
    assert world.server().run() is RunStatus.FINISHED
    asked = steps_asked(world, 2)
    assert asked == {name: DEALT[name] for name in asked}
    assert asked
    assert torch.equal(world.final, uninterrupted.final)


def test_steps_go_by_what_was_written_down_when_the_cohort_was_drawn() -> None:
    """A member that has not come back yet has no photos that anybody knows of."""
    world = four(num_rounds=2, plan=paced("dynamic"), paces=SLOWNESS)
    world.run()
    assert world.checkpoints.open_round is not None
    assert world.checkpoints.open_round.num_steps == STEPS
    assert world.checkpoints.open_round.pace == pytest.approx(SLOWNESS)
    assert world.checkpoints.open_round.wanted == 4


def test_a_client_that_joins_later_is_taken_to_be_as_fast_as_the_median() -> None:
    world = four(names=("a", "b", "c"), num_rounds=3, plan=paced("dynamic"), paces=dict.fromkeys(FOUR, 2.0))
    newcomer = four(names=("d",), paces={"d": 2.0})
    world.transport.connect(newcomer.peer("d"), delay=10.0)
    world.run()
    known = Workload(rule="dynamic", training=EPOCHS).deal(STEPS, dict.fromkeys(FOUR, 2.0))
    assert {n: s or STEPS[n] for n, s in steps_asked(world, 2).items()} == known


def test_scaffold_s_c_is_the_mean_of_the_clients_c_under_unequal_work() -> None:
    world = four(
        num_rounds=4, plan=paced("dynamic"), paces=SLOWNESS, algorithm=Scaffold(server_lr=1.0, option="2")
    )  # fmt: skip
    uploads = noting(world, 3)
    world.run()
    assert {name: upload.num_steps for name, upload in uploads.items()} == DEALT
    final = world.checkpoints.states[-1]
    ask = Broadcast(
        key=TaskKey(run_id="run-1", round=99, attempt=0),
        purpose=Purpose.TRAIN,
        vectors={"params": final.model.params},
        client_lr=0.1,
        counted=TaskKey(run_id="run-1", round=4, attempt=0),
    )
    kept = [world.states[name].commit_or_rollback(ask).algorithm[CONTROL_VARIATE] for name in FOUR]
    torch.testing.assert_close(
        final.model.optimizer[CONTROL_VARIATE], torch.stack(kept).mean(0), rtol=1e-5, atol=1e-6
    )  # fmt: skip


class WithFiles(FakeTransport):
    """Every answer comes in a file."""

    def receive(self, timeout: float) -> Arrival | None:
        arrival = super().receive(timeout)
        came_in = Received(path=Path("/nowhere"), digest="")
        return replace(arrival, source=came_in) if isinstance(arrival, Reply) else arrival


class WatchingSpool(MemorySpool):
    """Notes whose uploads are kept as the files that they came in."""

    def __init__(self) -> None:
        super().__init__()
        self.as_files: dict[int, set[str]] = {}

    def put(self, key: TaskKey, client: str, message: ClientMessage, source: Received | None = None) -> None:
        super().put(key, client, message, source)
        if source is not None:
            self.as_files.setdefault(key.round, set()).add(client)


def test_an_upload_that_is_scaled_is_not_kept_as_the_file_that_it_came_in() -> None:
    """Or what is folded would be what was sent."""
    world = four(num_rounds=2, plan=paced("cut"), paces=SLOWNESS)
    spool = world.spool = WatchingSpool()
    world.transport = WithFiles(world.clock)
    world.run()
    assert {name for name, steps in steps_asked(world, 2).items() if steps is not None} == {"c", "d"}
    assert spool.as_files == {1: set(FOUR), 2: {"a", "b"}}
