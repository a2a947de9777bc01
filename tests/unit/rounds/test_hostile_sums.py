"""A store that sends nonsense instead of sums over its photos is left out; the run and the others' head go on."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedshelf.algorithms.ridge import CHOSEN, GRAM, HELD_OUT, LAMBDAS, MOMENTS, Ridge
from fedshelf.core.errors import RunError
from fedshelf.core.events import ClientExcluded, ClientRefused, ClientStatus, RunStatus
from fedshelf.core.messages import CandidateScore, Evaluation, Failure, ServerMessage, Upload
from fedshelf.core.state import ClientState
from tests.fakes import Answer, MemoryClientStates
from tests.paper.test_ridge_paper import FIXED, NOTHING, all_photos, difference, head, split, world_of
from tests.worlds import World

SIZE = 49  # rows of the solution: 48 features and the constant
ENDS = torch.arange(SIZE, 0, -1).cumsum(0)  # of the rows of the triangle
DIAGONAL = ENDS - torch.arange(SIZE, 0, -1)


def rounds_of(
    *, num_rounds: int = 1, held_out: int = 0, hostile: bool = True, algorithm: Ridge = FIXED
) -> World:  # fmt: skip
    """Four stores; without the hostile one, three."""
    dealt = dict(list(split(all_photos(), "iid").items())[: 4 if hostile else 3])
    return world_of(dealt, held_out=held_out, algorithm=algorithm, num_rounds=num_rounds)


def tampered(
    change: Callable[[dict[str, Tensor]], None], *, round: int = 1
) -> Callable[[ServerMessage, Answer], Answer]:
    """Changes the sums of an upload in place."""

    def tamper(message: ServerMessage, honest: Answer) -> Answer:
        if not isinstance(honest, Upload) or honest.key.round != round:
            return honest
        sums = {name: vector.clone() for name, vector in honest.auxiliary.items()}
        change(sums)
        return honest.with_auxiliary(**sums)

    return tamper


def entries(name: str, places: Tensor | int, value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(sums: dict[str, Tensor]) -> None:
        sums[name][places] = value

    return change


def scaled(factor: float) -> Callable[[dict[str, Tensor]], None]:
    def change(sums: dict[str, Tensor]) -> None:
        for vector in sums.values():
            vector.mul_(factor)

    return change


def swapped(sums: dict[str, Tensor]) -> None:
    """One product more than there are photos, and one less than none."""
    counts = sums[MOMENTS].view(SIZE, -1)[-1]
    counts[0] += 1000
    counts[1] -= 1000


def moved(sums: dict[str, Tensor]) -> None:
    """The sums of a feature, from one product to another, so that they still add up."""
    feature = sums[MOMENTS].view(SIZE, -1)[0]
    feature[0] += 1e6
    feature[1] -= 1e6


def between(sums: dict[str, Tensor]) -> None:
    """A product of two features that is larger than their squares."""
    sums[GRAM][1] = 1e9


FIRST = {
    "the constant": (entries(GRAM, -1, 1e6), "do not add up"),
    "all sums": (scaled(1.5), "its sums count"),
    "less than nothing": (scaled(-1.0), "below zero"),
    "squares below zero": (entries(GRAM, DIAGONAL[:48], -1.0), "below zero"),
    "numbers of photos below zero": (swapped, "below zero"),
    "sums of one product": (moved, "Cauchy-Schwarz"),
    "products of features": (between, "Cauchy-Schwarz"),
    "a number that is none": (entries(GRAM, 5, float("nan")), "nan"),
    "an infinite number": (entries(HELD_OUT + MOMENTS, 5, float("inf")), "inf"),
}


@pytest.mark.parametrize("what", FIRST)
def test_sums_that_are_those_of_no_photos_are_refused_and_the_others_count(what: str) -> None:
    change, reason = FIRST[what]
    world, without = rounds_of(), rounds_of(hostile=False)
    world.tampers["d"] = tampered(change)
    assert world.run() is without.run() is RunStatus.FINISHED
    (member,) = (m for m in world.finished[0].clients if m.client == "d")
    assert member.status is ClientStatus.REFUSED
    assert reason in member.reason
    assert torch.equal(world.final, without.final)


def test_sums_of_other_photos_than_the_store_has_joined_with_are_refused() -> None:
    world = rounds_of()
    world.tampers["d"] = lambda m, honest: (
        replace(honest, num_examples=honest.weight + 1) if isinstance(honest, Upload) else honest
    )
    world.run()
    (member,) = (m for m in world.finished[0].clients if m.client == "d")
    assert member.status is ClientStatus.REFUSED
    assert "joined with" in member.reason


def test_sums_of_more_photos_than_may_count_are_refused() -> None:
    world = rounds_of()
    world.rounds = {"max_examples": len(world.trainer("b").train)}
    world.run()
    most = world.rounds["max_examples"]
    for member in world.finished[0].clients:
        is_more = len(world.trainer(member.client).train) > most
        assert (member.status is ClientStatus.REFUSED) == is_more
        assert ("--max-examples" in member.reason) == is_more


def unsolvable(sums: dict[str, Tensor]) -> None:
    """Take more out than all stores together have sent; the number of photos stays."""
    sums[GRAM][DIAGONAL[:48]] -= 1e7


def unsolvable_without_validation(sums: dict[str, Tensor]) -> None:
    """The sums of all photos stay as they are, those that the stores choose on can no longer be solved."""
    sums[GRAM][DIAGONAL[:48]] -= 1e7
    sums[HELD_OUT + GRAM][DIAGONAL[:48]] += 1e7


@pytest.mark.parametrize("change", [unsolvable, unsolvable_without_validation])
@pytest.mark.parametrize("others_change", [False, True])
def test_a_difference_that_makes_the_system_unsolvable_is_left_out_of_its_round(
    change: Callable[[dict[str, Tensor]], None], others_change: bool
) -> None:
    world, honest = (rounds_of(num_rounds=2, held_out=2) for _ in range(2))
    world.tampers["d"] = tampered(change, round=2)
    if others_change:  # much, so that norms tell nothing
        for one in (world, honest):
            one.num_rounds = 1
            one.run()
            one.data["a"] = (all_photos(900, seed=4), one.data["a"][1])
            one.clients = {name: one.client(name) for name in one.names}
            one.num_rounds = 2
            one.restart()
            assert one.run_connected() is RunStatus.FINISHED
    else:
        assert world.run() is honest.run() is RunStatus.FINISHED
    last = {member.client: member for member in world.finished[-1].clients}
    assert [last[name].status for name in "abc"] == [ClientStatus.COUNTED] * 3
    assert last["d"].status is ClientStatus.REFUSED
    assert "cannot be computed" in last["d"].reason
    assert {event.client for event in world.sink.of(ClientExcluded)} == {"d"}
    assert difference(head(world), head(honest)) < 1e-6  # d's own sums of round 1 still count


def test_stores_that_make_the_system_unsolvable_together_cannot_end_the_run() -> None:
    """Each alone takes out less than there is."""
    world = rounds_of(num_rounds=2)

    def half(sums: dict[str, Tensor]) -> None:
        total = world.checkpoints.states[-1].model.optimizer[GRAM]
        sums[GRAM][: ENDS[47]] -= 0.6 * total[: ENDS[47]]
        sums[GRAM][ENDS[:48] - 1] = 0.0

    world.tampers |= {"c": tampered(half, round=2), "d": tampered(half, round=2)}
    assert world.run() is RunStatus.FINISHED
    assert bool(torch.isfinite(world.final).all())
    last = {member.client: member.status for member in world.finished[-1].clients}
    assert last["a"] is last["b"] is ClientStatus.COUNTED
    assert ClientStatus.REFUSED in (last["c"], last["d"])


def scores(num_models: int, num_losses: int, *, correct: int = 0, loss: float = 0.0) -> tuple[CandidateScore, ...]:
    return (CandidateScore(num_correct=correct, losses=(loss,) * num_losses),) * num_models


@pytest.mark.parametrize(
    "found",
    [
        pytest.param(scores(64, 13), id="of more models than there are"),
        pytest.param(scores(10, 1), id="at fewer temperatures"),
        pytest.param((), id="none"),
        pytest.param(scores(10, 13, correct=1000), id="more right than photos"),
        pytest.param(scores(10, 13, loss=-1e9), id="losses below zero"),
    ],
)
def test_scores_that_make_no_sense_are_not_used_whoever_is_first(found: tuple[CandidateScore, ...]) -> None:
    world = rounds_of(held_out=3, algorithm=Ridge())

    def tamper(message: ServerMessage, honest: Answer) -> Answer:
        asked = isinstance(honest, Evaluation) and honest.candidates
        return replace(honest, candidates=found) if asked and isinstance(honest, Evaluation) else honest

    world.tampers["d"] = tamper
    world.delays = {"a": 5.0, "b": 5.0, "c": 5.0}
    assert world.run() is RunStatus.FINISHED
    assert any(event.client == "d" and "scores" in event.reason for event in world.sink.of(ClientRefused))
    chosen = world.checkpoints.states[-1].model.optimizer[CHOSEN]
    world.tampers["d"] = lambda message, honest: (
        Failure(key=honest.key, reason="no") if isinstance(honest, Evaluation) and honest.candidates else honest
    )
    without = rounds_of(held_out=3, algorithm=Ridge())
    without.tampers = world.tampers
    without.run()
    assert torch.equal(chosen, without.checkpoints.states[-1].model.optimizer[CHOSEN])


def test_a_store_cannot_choose_alone_by_claiming_many_validation_photos() -> None:
    """Its scores weigh as if it had ten times the photos of the median store."""
    world = rounds_of(held_out=3, algorithm=Ridge())
    world.data["d"] = (world.data["d"][0], all_photos(300, seed=5))
    world.clients["d"] = world.client("d")

    def wants(index: int, correct: int) -> Callable[[ServerMessage, Answer], Answer]:
        """Its photos are right with the model at that index, and wrong with all others."""
        found = tuple(
            CandidateScore(num_correct=correct if number == index else 0, losses=(1.0,) * 13) for number in range(10)
        )
        return lambda m, honest: (
            replace(honest, candidates=found) if isinstance(honest, Evaluation) and honest.candidates else honest
        )

    world.tampers |= {"a": wants(2, 3), "b": wants(2, 3), "c": wants(2, 3), "d": wants(7, 10)}
    world.run()
    # 10 of 300 photos, weighed as 30 (ten times the median, 3), are 1 against 9; unbounded they are 10 against 9.
    assert float(world.checkpoints.states[-1].model.optimizer[CHOSEN][0]) == LAMBDAS[2]


class TestLostState:
    """What a store has sent is subtracted from its next sums: it must be what the server has counted."""

    @staticmethod
    def extended(world: World) -> World:
        world.clients = {name: world.client(name) for name in world.names}
        world.num_rounds += 1
        world.restart()
        assert world.run_connected() is RunStatus.FINISHED
        return world

    def test_a_store_that_has_lost_its_state_is_never_counted_twice(self) -> None:
        world = rounds_of()
        world.run()
        before = world.final
        world.states["b"] = MemoryClientStates()
        self.extended(world)
        last = {member.client: member for member in world.finished[-1].clients}
        assert last["b"].status is ClientStatus.FAILED
        assert "(those of round 1) are not the last ones known here (none)" in last["b"].reason
        assert [last[name].status for name in "acd"] == [ClientStatus.COUNTED] * 3
        assert difference(world.final.double().numpy(), before.double().numpy()) < 1e-6

    def test_a_store_that_has_lost_its_state_cannot_withdraw_and_is_told_why(self) -> None:
        world = rounds_of()
        world.run()
        world.states["b"] = MemoryClientStates()
        world.data["b"] = (NOTHING, NOTHING)
        world.withdrawing.add("b")
        self.extended(world)
        assert "Restore the older one" in world.transport.refused["line-to-b"]
        assert world.transport.final_refusals == {"line-to-b"}
        assert world.checkpoints.states[-1].photos["b"] > 0

    def test_a_store_that_withdraws_is_recorded_as_withdrawn_and_not_as_a_participant(self) -> None:
        world = rounds_of()
        world.run()
        world.data["b"] = (NOTHING, NOTHING)
        world.withdrawing.add("b")
        self.extended(world)
        last = {member.client: (member.status, member.reason) for member in world.finished[-1].clients}
        assert last == {
            **dict.fromkeys("acd", (ClientStatus.COUNTED, "")),
            "b": (ClientStatus.WITHDRAWN, "its photos are no longer in the model"),
        }

    @pytest.mark.parametrize("kept", [0, 1])
    def test_a_server_restored_from_an_older_checkpoint_takes_no_difference_from_a_newer_one(self, kept: int) -> None:
        world = rounds_of()
        world.run()
        world.data["b"] = (all_photos(50, seed=6), NOTHING)
        self.extended(self.extended(world))  # stores know by their third task that the second has counted
        old = world.checkpoints.states[:kept]
        world.checkpoints.states, world.checkpoints.open_round = old, None
        world.clients = {name: world.client(name) for name in world.names}
        world.restart()
        with pytest.raises(RunError, match=r"Restore the older one"):
            world.run_connected()
        assert world.checkpoints.states == old

    def test_an_answer_that_the_restored_server_has_not_counted_is_sent_again(self) -> None:
        world = rounds_of()
        world.run()
        first = world.checkpoints.states[0]
        world.data["b"] = (all_photos(50, seed=6), NOTHING)
        self.extended(world)
        expected = world.final
        world.checkpoints.states = [first]
        world.clients = {name: world.client(name) for name in world.names}
        world.restart()
        assert world.run_connected() is RunStatus.FINISHED
        assert torch.equal(world.final, expected)


def test_a_client_state_of_sums_knows_the_task_that_it_was_sent_for() -> None:
    world = rounds_of()
    world.run()
    state = world.states["a"].peek(world.checkpoints.states[-1].counted["a"])
    assert isinstance(state, ClientState)
    assert state.algorithm["task"].tolist() == [1.0, 0.0]


def test_an_algorithm_that_trains_lets_no_store_withdraw() -> None:
    """Only sums can be taken out exactly; the client ends, and the others go on."""
    world = World(names=("a", "b", "c"), withdrawing={"c"})
    world.plan = {"start_clients": 2}
    world.connect_all()
    assert world.server().run() is RunStatus.FINISHED
    assert "only sums can be taken out" in world.transport.refused["line-to-c"]
    assert world.transport.final_refusals == {"line-to-c"}
    assert [m.client for m in world.finished[-1].clients] == ["a", "b"]
